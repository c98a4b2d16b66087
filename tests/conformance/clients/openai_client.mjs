// OpenAI's client for Node: `openai_client.mjs MODEL KEY URL...` writes what it makes of each URL, as JSON, a line each.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const installed = createRequire(pathToFileURL(`${process.env.CLIENTS}/package.json`));
const { default: OpenAI, toFile } = installed("openai");
const { zodResponseFormat } = installed("openai/helpers/zod");
const { z } = installed("zod");

const messages = [{ role: "user", content: "Grüezi, what's up?" }];
const weather = {
  type: "function",
  function: {
    name: "weather",
    strict: true,
    parameters: {
      type: "object",
      properties: { city: { type: "string" } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};
const Trip = z.object({ city: z.string(), days: z.number() });

async function all(iterable) {
  const found = [];
  for await (const one of iterable) found.push(one);
  return found;
}

async function errors(client, model) {
  const found = [];
  for (const status of [400, 401, 404, 429, 500, 503]) {
    const content = `please fail: ${status}`;
    const error = await client.chat.completions.create({ model, messages: [{ role: "user", content }] }).then(
      () => assert.fail("no error"),
      (thrown) => thrown,
    );
    assert.equal(error.status, status);
    found.push([error.constructor.name, error.message, error.error, error.code, error.requestID]);
  }
  return found;
}

async function files(client) {
  const content = Buffer.from(Array.from({ length: 70_000 }, (_, n) => n % 256));
  const made = await client.files.create({ file: await toFile(content, "größe.bin"), purpose: "batch" });
  const body = Buffer.from(await (await client.files.content(made.id)).arrayBuffer());
  assert.ok(body.equals(content));
  return [made, await all(client.files.list({ purpose: "batch" })), await client.files.delete(made.id)];
}

async function results(model, apiKey, baseURL) {
  const client = new OpenAI({ apiKey, baseURL, maxRetries: 0 });
  const chat = client.chat.completions;
  const plain = await chat.create({ model, messages });
  assert.equal(plain.choices[0].message.content, "?pu s'tahw ,izeürG — ✓");
  const streamed = await all(await chat.create({ model, messages, stream: true, stream_options: { include_usage: true } }));
  const assembled = await chat.stream({ model, messages, tools: [weather] }).finalChatCompletion();
  const tools = await chat.create({ model, messages, tools: [weather] });
  assert.equal(assembled.choices[0].message.tool_calls[0].function.arguments, '{"city": "Zürich"}');
  assert.equal(tools.choices[0].message.tool_calls[0].function.arguments, '{"city": "Zürich"}');
  const parsed = await chat.parse({ model, messages, response_format: zodResponseFormat(Trip, "trip") });
  assert.deepEqual(parsed.choices[0].message.parsed, { city: "Zürich", days: 7 });
  const raw = await chat.create({ model, messages }).asResponse();
  const first = await client.responses.create({ model, input: "Hello" });
  return {
    plain,
    streamed,
    assembled,
    tools,
    parsed,
    raw: [raw.status, await raw.text(), raw.headers.get("x-ratelimit-remaining-requests")],
    completions: await client.completions.create({ model, prompt: "one" }),
    embeddings: await client.embeddings.create({ model, input: ["a", "b"] }),
    responses: [first, await client.responses.create({ model, input: "And?", previous_response_id: first.id })],
    "responses, streamed": await all(await client.responses.create({ model, input: "Hello", stream: true })),
    "responses, fetched": await client.responses.retrieve(first.id),
    files: await files(client),
    errors: await errors(client, model),
  };
}

const [model, key, ...urls] = process.argv.slice(2);
for (const url of urls) console.log(JSON.stringify(await results(model, key, url)));
