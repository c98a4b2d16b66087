"""What a decision costs: `python -m tests.bench.bench_routing` prints microseconds a call with 200 workloads.

The workloads use every kind of condition, by turns; the call that is measured fulfils the last of each kind, and has a
system prompt of 4 KB that was seen before. `new prompt` is the same with a prompt that was not.
"""

import time
from collections.abc import Callable

import orjson
from msgspec.structs import replace

from routing.matching import Asked, Match
from routing.policy import Call, choose, match
from routing.request import system_fingerprint, system_of, tools_of
from routing.targets import Model, Overlay, Ref, Route, RouteTable

WORKLOADS, REPEATS, ROUNDS = 200, 500, 20
SENTENCE = "You help customers of the shop with their orders, politely, and never promise a refund by yourself. "
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


def prompt(number: int) -> str:
    return SENTENCE * 40 + f"Desk {number}."


def rule(number: int) -> Match:
    """Ten kinds in turn."""
    tools = orjson.dumps([TOOL, {"type": "function", "name": f"tool{number}"}])
    kinds = [
        Match(headers=(("x-team", f"t{number}"),)),
        Match(metadata=(("app", f"a{number}"),)),
        Match(models=(f"m{number}", "gpt-4o"), headers=(("x-desk", f"d{number}"),)),
        Match(clients=(f"c{number}",)),
        Match(paths=("/v1/embeddings",), models=(f"e{number}",)),
        Match(tools=("look_up", f"tool{number}")),
        Match(tools_fingerprints=(tools_of(tools).fingerprint,)),
        Match(system_fingerprints=(system_fingerprint(prompt(number)),)),
        Match(system_pattern=rf"(?i)desk {number}\b.*"),
        Match(models=("gpt-4o",), system_pattern=rf"(shop|store).*Desk {number}\."),
    ]
    return kinds[number % len(kinds)]


def table(workloads: int = WORKLOADS) -> RouteTable:
    """The rules above, each second workload with a canary."""
    names = [f"w{number}" for number in range(workloads)]
    models = {
        name: Model(name=name, upstream="vllm", base_url="http://m/v1", model=name, adapters=True)
        for name in ("big", "small")
    }
    return RouteTable(
        snapshot="s",
        models=models,
        routes={name: Route(workload=name, serve="big", match=rule(n)) for n, name in enumerate(names)},
        default=Route(workload="default", serve="big"),
        overlays={
            name: Overlay(workload=name, rollout="r", candidate=Ref(model="small", adapter="a"), weight=50, mirror=0.1)
            for name in names[::2]
        },
    )


def requests(last: int) -> dict[str, Asked]:
    """One for each kind of condition; `last` is the number of the first of the last ten workloads."""
    headers = {f"x-header-{number}": "value" for number in range(12)} | {"user-agent": "OpenAI/Python"}
    plain = Asked(headers=headers, model="gpt-4o", path="/v1/chat/completions", client="app", system=prompt(-1))
    tools = tools_of(orjson.dumps([TOOL, {"type": "function", "name": f"tool{last + 6}"}]))
    return {
        "named": replace(plain, headers=headers | {"x-workload-id": f"w{last}"}),
        "header": replace(plain, headers=headers | {"x-team": f"t{last}"}),
        "metadata": replace(plain, metadata={"app": f"a{last + 1}"}),
        "header, model": replace(plain, headers=headers | {"x-desk": f"d{last + 2}"}),
        "client": replace(plain, client=f"c{last + 3}"),
        "path, model": replace(plain, path="/v1/embeddings", model=f"e{last + 4}"),
        "tools": replace(plain, tools=("look_up", f"tool{last + 5}")),
        "tools fingerprint": replace(plain, tools=tools.names, tools_fingerprint=tools.fingerprint),
        "system fingerprint": replace(plain, system=prompt(last + 7)),
        "system pattern": replace(plain, model="", system=prompt(last + 8)),
        "model, pattern": replace(plain, system=prompt(last + 9)),
        "nothing": plain,
    }


def microseconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """The least CPU time of some rounds."""
    taken = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(repeats):
            function()
        taken.append((time.process_time() - start) / repeats * 1e6)
    return min(taken)


def decide(routes: RouteTable, asked: Asked) -> str:
    workload = match(routes, asked).route.workload
    choose(routes, Call(workload=workload, exchange_id="0193", session="s"))
    return workload


def again(routes: RouteTable, asked: Asked) -> Callable[[], object]:
    """The prompt is decoded anew each time, as from a request's body, so that its hash is not known yet."""
    *others, system = asked
    text = system.encode()
    return lambda: decide(routes, Asked(*others, text.decode()))


def main() -> None:
    routes = table()
    for name, asked in requests(WORKLOADS - 10).items():
        print(f"{name:20} -> {decide(routes, asked):8} {microseconds(again(routes, asked)):6.1f} us")
    numbers = iter(range(10**9))
    plain = requests(WORKLOADS - 10)["nothing"]
    took = microseconds(lambda: decide(routes, replace(plain, system=prompt(next(numbers)))), 20)
    print(f"{'new prompt':20} {'':11} {took:6.1f} us")
    messages = orjson.dumps([{"role": "system", "content": prompt(0)}, {"role": "user", "content": "Hello." * 200}])
    print(f"{'reading the prompt':20} {'':11} {microseconds(lambda: system_of(messages)):6.1f} us")


if __name__ == "__main__":
    main()
