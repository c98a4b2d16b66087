"""Pretrains the demo's tiny base model from scratch, on made-up text: `python -m flywheel.demo.pretrain OUT`."""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flywheel.demo import corpus, labelled
from flywheel.demo.workload import Workload, WorkloadError, load

END = "<|end|>"
PAD = "<|pad|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
_CALL = ("<tool_call>", "</tool_call>")
# A call's fixed parts are one token each: what the model has to write is the tool's name and the values.
_SCAFFOLD = ('\n{"name": "', '", "arguments": {"', '", "arguments": {}}\n', '": "', '", "', '"}}\n')

# Tools are rendered as name(arguments), or as names alone: short prompts make a tiny model quick to train and to serve.
_CHAT_TEMPLATE = """\
{%- macro call(tool_call) -%}
{%- set f = tool_call.function if tool_call.function is defined else tool_call -%}
{{- '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' -}}
{{- (f.arguments if f.arguments is string else f.arguments | tojson) + '}\\n</tool_call>' -}}
{%- endmacro -%}
{{- '<|system|>' -}}
{%- if messages and messages[0].role == 'system' -%}{{- messages[0].content -}}{%- endif -%}
{%- for tool in tools or [] -%}
{%- set f = tool.function if tool.function is defined else tool -%}
{{- '\\n' + f.name%ARGUMENTS% -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- for message in messages -%}
{%- if not (loop.first and message.role == 'system') -%}
{{- '<|' + message.role + '|>' + (message.content or '') -}}
{%- for tool_call in message.tool_calls or [] -%}{{- call(tool_call) -}}{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


_ARGUMENTS = " + '(' + ((f.parameters or {}).get('properties') or {}).keys() | join(' ') + ')'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The shape of a model and how long it is pretrained. Heads are 32 wide, the least that vLLM serves.

    `signatures` says whether its prompts name each tool's arguments, `mixed` whether it is pretrained in mixed
    precision (bfloat16), which is a third quicker for the larger one.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    steps: int
    learning_rate: float
    matrix_rate: float = 0.02
    batch_size: int = 32
    signatures: bool = True
    mixed: bool = False


SIZES: Mapping[str, Size] = {
    "small": Size(vocabulary=1_536, hidden=128, intermediate=320, layers=3, heads=4, steps=1_500, learning_rate=5e-3),
    "base": Size(
        vocabulary=2_048,
        hidden=192,
        intermediate=512,
        layers=4,
        heads=6,
        steps=4_400,
        learning_rate=4e-3,
        signatures=False,
        mixed=True,
    ),
}
_CONTEXT = 1_024
# Of the loss on the words of a request, beside that on the call: English helps, guessing made-up names does not.
_REQUEST_WEIGHT = 0.5


def rows(texts: Sequence[Workload], seed: int) -> Iterator[corpus.Row]:
    """The rows to learn from: made-up ones, and, where other text is given, one of that to each made-up one."""
    made_up = corpus.conversations(seed)
    if not texts:
        return made_up
    others = labelled.labelled(texts, seed)
    return itertools.chain.from_iterable(zip(made_up, others, strict=False))


def make_tokenizer(size: Size, sample: Sequence[corpus.Row]) -> Any:
    """A byte-level BPE tokenizer for the sample, with the chat template; each digit is a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # A space is a token of its own: a value then has the same tokens in the request and, after a quote, in the call.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, *_ROLES]
    added = [AddedToken(token, special=False, normalized=False) for token in (*_CALL, *_SCAFFOLD)]
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary - len(added),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_plain_text(row) for row in sample), trainer)
    tokenizer.add_tokens(added)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _CHAT_TEMPLATE.replace("%ARGUMENTS%", _ARGUMENTS if size.signatures else "")
    return wrapped


def _plain_text(row: corpus.Row) -> str:
    user, assistant = row["messages"][1], row["messages"][2]
    function = assistant["tool_calls"][0]["function"]
    values = " ".join(json.loads(function["arguments"]).values())
    names = " ".join([tool["function"]["name"] for tool in row["tools"]])
    return f"{row['messages'][0]['content']} {user['content']} {function['name']} {values} {names}"


def make_model(size: Size, tokenizer: Any, seed: int) -> Any:
    """A Llama of that size with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            head_dim=32,
            max_position_embeddings=_CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _encoded(rows: Iterator[corpus.Row], tokenizer: Any, size: Size, rng: random.Random) -> Iterator[list[list[int]]]:
    """Batches of token ids, rows of like length together, so that little is padding."""
    per_round = size.batch_size * 16
    while True:
        texts = [
            tokenizer.apply_chat_template(**_arguments(row), tokenize=False)
            for row in itertools.islice(rows, per_round)
        ]
        ids = sorted((one[:_CONTEXT] for one in tokenizer(texts)["input_ids"]), key=len)
        batches = [ids[at : at + size.batch_size] for at in range(0, len(ids), size.batch_size)]
        rng.shuffle(batches)
        yield from batches


def _arguments(row: corpus.Row) -> dict[str, Any]:
    return {"conversation": row["messages"], "tools": row["tools"]}


def _tensors(batch: Sequence[Sequence[int]], tokenizer: Any) -> tuple[Any, Any]:
    """Token ids, and how much each counts: the tools nothing, the request a little, the call fully."""
    import torch

    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    inputs = torch.full((len(batch), max(map(len, batch))), tokenizer.pad_token_id)
    weights = torch.zeros(inputs.shape)
    for at, ids in enumerate(batch):
        inputs[at, : len(ids)] = torch.tensor(ids)
        weights[at, ids.index(tokenizer.eos_token_id) + 1 : len(ids)] = _REQUEST_WEIGHT
        weights[at, ids.index(assistant) + 1 : len(ids)] = 1.0
    return inputs, weights


def _optimizers(model: Any, size: Size) -> list[tuple[Any, float]]:
    """Muon for the layers' matrices, which then need a third of the steps, AdamW for the rest; with their rates."""
    import torch

    layers = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in layers}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(layers, lr=size.matrix_rate, momentum=0.95, weight_decay=0.01)
    adamw = torch.optim.AdamW(rest, lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, size.matrix_rate), (adamw, size.learning_rate)]


def train(model: Any, tokenizer: Any, size: Size, data: Iterator[corpus.Row], seed: int) -> list[float]:
    """Trains in place for the size's number of steps, and returns the loss on the call at every hundredth."""
    import torch

    optimizers = _optimizers(model, size)
    batches = _encoded(data, tokenizer, size, random.Random(seed))
    losses: list[float] = []
    model.train()
    started = time.monotonic()
    for step in range(size.steps):
        warmup, progress = min(1.0, (step + 1) / 100), step / size.steps
        share = warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        inputs, weights = _tensors(next(batches), tokenizer)
        # Padding is on the right, where causal attention never looks, and weighs nothing: no mask is needed.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=size.mixed):
            logits = model(input_ids=inputs).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            losses.append(round(each.detach()[weights == 1].mean().item(), 4))
            sys.stdout.write(f"step {step + 1}/{size.steps} loss {losses[-1]:.3f} {time.monotonic() - started:.0f} s\n")
            sys.stdout.flush()
    return losses


def _generators(texts: Sequence[Workload]) -> list[Path]:
    """The files that shape the rows."""
    here = Path(__file__).parent
    names = ["corpus.py", "grammar.py", "everyday.txt", *(["labelled.py"] if texts else [])]
    return [here / name for name in names]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save(out: Path, model: Any, tokenizer: Any, about: Mapping[str, Any]) -> None:
    """Writes the model as Hugging Face does, and `manifest.json` last: where that stands, the rest is whole."""
    import tokenizers
    import torch
    import transformers

    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    model.generation_config.update(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    manifest = {
        **about,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "sha256": {path.name: _sha256(path) for path in sorted(out.iterdir()) if path.is_file()},
    }
    partial = out / "manifest.json.tmp"
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / "manifest.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2: a text file cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m flywheel.demo.pretrain", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write the model to")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], help="JSONL files with text and intent to learn from as well"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--steps", type=int, help="instead of the size's own number of steps")
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        texts = [load(path) for path in args.text]
    except WorkloadError as error:
        sys.stderr.write(f"pretrain: {error}\n")
        return 2
    size = SIZES[args.size]
    if args.steps:
        size = Size(**{**asdict(size), "steps": args.steps})
    tokenizer = make_tokenizer(size, list(itertools.islice(rows(texts, args.seed), 20_000)))
    model = make_model(size, tokenizer, args.seed)
    losses = train(model, tokenizer, size, rows(texts, args.seed + 1), args.seed)
    about = {
        "script": "flywheel/demo/pretrain.py",
        "text": [{"file": path.name, "sha256": _sha256(path)} for path in args.text]
        + [{"generated_by": path.name, "sha256": _sha256(path)} for path in _generators(texts)],
        "seed": args.seed,
        "size": {"name": args.size, **asdict(size)},
        "losses": losses,
        "seconds": round(time.monotonic() - started, 1),
    }
    save(args.out, model, tokenizer, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
