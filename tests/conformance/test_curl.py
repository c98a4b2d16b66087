"""curl: status, headers and body through the gateway are the upstream's, byte for byte."""

import json
from pathlib import Path

import pytest

from tests.conformance.answers import MODEL
from tests.conformance.conftest import Ways
from tests.conformance.installed import on_path, output
from tests.conformance.upstream import KEY

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Grüezi"}]}
JSON = ("-H", "content-type: application/json", "-d")
CHAT = "chat/completions"
OWN = "x-understudy-"
OF_THE_HOP = ("connection:", "transfer-encoding:", "keep-alive:", "date:", "server:")

CALLS: dict[str, tuple[str, ...]] = {
    "plain": (CHAT, *JSON, json.dumps(ASK)),
    "spaced": (CHAT, *JSON, json.dumps(ASK, indent=4, ensure_ascii=False)),
    "streamed": (CHAT, "-N", *JSON, json.dumps(ASK | {"stream": True})),
    "streamed, HTTP/1.0": (CHAT, "-0", *JSON, json.dumps(ASK | {"stream": True})),
    "HTTP/1.0": (CHAT, "-0", *JSON, json.dumps(ASK)),
    "chunked": (CHAT, "-H", "transfer-encoding: chunked", *JSON, json.dumps(ASK)),
    "asks first": (CHAT, "-H", "expect: 100-continue", *JSON, json.dumps(ASK)),
    "ends the connection": (CHAT, "-H", "connection: close", *JSON, json.dumps(ASK)),
    "no JSON": (CHAT, "-H", "content-type: text/plain", "-d", json.dumps(ASK)),
    "an error": (CHAT, *JSON, json.dumps(ASK | {"unknown": 1})),
    "a 429": (CHAT, *JSON, json.dumps(ASK | {"user": "please fail: 429"})),
    "another key": (CHAT, "-H", "authorization: Bearer sk-wrong", *JSON, json.dumps(ASK)),
    "embeddings": ("embeddings", *JSON, json.dumps({"model": MODEL, "input": "a"})),
    "responses": ("responses", "-N", *JSON, json.dumps({"model": MODEL, "input": "a", "stream": True})),
    "a query": ("files?limit=2&purpose=batch",),
    "nothing to delete": ("files/file-none", "-X", "DELETE"),
    "a file": ("files", "-F", "purpose=batch", "-F", "file=@{file};filename=größe.bin"),
}


@pytest.mark.parametrize("call", CALLS)
def test_curl(ways: Ways, call: str, tmp_path: Path) -> None:
    direct, through = (fetched(url, call, tmp_path) for url in (ways.direct, ways.through))
    assert through == direct


def test_an_offer_of_http_2(ways: Ways) -> None:
    """The gateway serves what many servers answer with 400: a call that offers to go on in HTTP/2."""
    curl = on_path("curl", "curl")
    words = ("-s", "-w", "%{http_code}", "-H", f"authorization: Bearer {KEY}", *CALLS["plain"][1:])
    plain, offering = (output(curl, *more, *words, f"{ways.through}/{CHAT}") for more in ((), ("--http2",)))
    assert offering == plain
    assert plain.endswith("200")


def test_one_connection_for_several_calls(ways: Ways) -> None:
    """curl opens one connection for two replies with a length, a stream and an error."""
    curl = on_path("curl", "curl")
    url = f"{ways.through}/{CHAT}"
    calls = []
    for name in ("plain", "streamed", "an error", "plain"):
        calls += [url, "-s", "-o", "/dev/null", "-w", "%{http_code} %{num_connects}\n", *CALLS[name][1:]]
        calls += ["-H", f"authorization: Bearer {KEY}", "--next"]
    assert output(curl, *calls[:-1]).splitlines() == ["200 1", "200 0", "400 0", "200 0"]


def fetched(url: str, call: str, folder: Path) -> tuple[str, list[str], bytes]:
    """Status line, headers and body of one call."""
    curl = on_path("curl", "curl")
    (folder / "sent").write_bytes(bytes(range(256)) * 9000)
    path, *words = (word.replace("{file}", str(folder / "sent")) for word in CALLS[call])
    key = () if "another key" in call else ("-H", f"authorization: Bearer {KEY}")
    output(curl, "-sS", "-D", f"{folder}/head", "-o", f"{folder}/body", *key, *words, f"{url}/{path}")
    blocks = (folder / "head").read_text().lower().strip().split("\n\n")
    status, *headers = blocks[-1].splitlines()  # before it there may be a 100 Continue
    kept = sorted(line for line in headers if not line.startswith((OWN, *OF_THE_HOP)))
    return status, kept, (folder / "body").read_bytes()
