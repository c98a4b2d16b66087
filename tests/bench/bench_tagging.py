"""What reading a call costs by itself: its body's fields, its labels, its tags. Without and with other gateways' tags.

python -m tests.bench.bench_tagging [--calls 20000] [--rounds 15]
"""

import argparse
import time
from collections.abc import Callable

from gateway.fields import Fields, read_fields
from gateway.tagging import tag
from routing.labels import labels_of

BODY = b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * 800 + b'"}],"temperature":0}'
CURL = dict.fromkeys(("host", "user-agent", "accept", "content-type", "content-length"), "value")
OPENAI = CURL | dict.fromkeys(
    (
        "accept-encoding", "connection", "authorization", "x-stainless-lang", "x-stainless-package-version",
        "x-stainless-os", "x-stainless-arch", "x-stainless-runtime", "x-stainless-runtime-version",
        "x-stainless-async", "x-stainless-retry-count", "x-stainless-read-timeout", "x-workload-id",
    ),
    "value",
)  # fmt: skip
TAGGED = {
    "5 litellm tags": {"x-litellm-tags": "team:desk,production,workload_id:refund,a,b"},
    "5 helicone properties": {f"helicone-property-{name}": "value" for name in "abcde"},
    "5 portkey labels": {"x-portkey-metadata": '{"_user": "u", "_prompt": "p", "a": "1", "b": "2", "c": "3"}'},
}


def microseconds(once: Callable[[], object], calls: int, rounds: int) -> float:
    """Of the best round: what else the machine does only adds."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(calls):
            once()
        found.append((time.process_time() - started) / calls * 1e6)
    return min(found)


def labelled(headers: dict[str, str], fields: Fields) -> dict[str, str]:
    return labels_of(headers, fields.metadata, fields.tensorzero_tags, fields.tensorzero_episode)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    fields = read_fields(BODY)
    print(f"{'the body':<34}{microseconds(lambda: read_fields(BODY), given.calls, given.rounds):6.2f} us")
    kinds = {"5 headers": CURL, "openai's 18 headers": OPENAI}
    for name, headers in (kinds | {name: CURL | more for name, more in TAGGED.items()}).items():
        labels = microseconds(lambda headers=headers: labelled(headers, fields), given.calls, given.rounds)
        tags = microseconds(lambda headers=headers: tag(headers, fields), given.calls, given.rounds)
        print(f"{name:<22}labels {labels:6.2f} us    tags {tags:6.2f} us")


if __name__ == "__main__":
    main()
