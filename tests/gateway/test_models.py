"""`GET /v1/models`: what clients may ask for, and what each model does, as far as the key may know."""

from gateway.auth import Key
from gateway.models_endpoint import models_of
from routing.matching import Match
from routing.targets import Mirror, Model, Overlay, Price, Ref, Route, RouteTable
from tests.gateway.conftest import running
from tests.gateway.fakes import ok, upstream
from tests.gateway.test_proxy import MakeSettings

MODELS = {
    "big": Model(name="big", upstream="nim", base_url="http://a", model="meta/big", price=Price(input=0.6, output=0.9)),
    "spare": Model(name="spare", upstream="openai", base_url="http://b", model="gpt-4o"),
    "small": Model(name="small", upstream="vllm", base_url="http://c", model="meta/small", adapters=True),
}
DESK = Route(
    workload="desk",
    serve="big",
    match=Match(models=("gpt-4o", "big")),
    fallbacks=("spare",),
    mirrors=(Mirror(model="spare", sample=0.1),),
)
SPLIT = Route(workload="split", serve="big", split=(("big", 80.0), ("spare", 20.0)))
OVERLAY = Overlay(workload="desk", rollout="r", candidate=Ref(model="small", adapter="run-7"), weight=5, mirror=0.2)
TABLE = RouteTable(
    snapshot="s",
    models=MODELS,
    routes={"desk": DESK, "split": SPLIT},
    default=Route(workload="default", serve="spare"),
    overlays={"desk": OVERLAY},
)


def test_each_model_s_parts() -> None:
    """Shares of a rollout and of a split, a candidate's adapter, mirrors, fallbacks, open breakers."""
    found = {model["id"]: model["x-understudy"] for model in models_of(TABLE, None, ["small:run-7"])}
    assert found["big"] == {
        "model": "meta/big",
        "adapters": False,
        "price": {"input": 0.6, "output": 0.9},
        "open_breakers": [],
        "workloads": ["desk"],
        "parts": [
            {"workload": "desk", "as": "incumbent", "share": 95},
            {"workload": "split", "as": "incumbent", "share": 80.0},
        ],
    }
    assert found["spare"]["parts"] == [
        {"workload": "desk", "as": "fallback"},
        {"workload": "desk", "as": "mirror", "mirror": 10.0},
        {"workload": "split", "as": "incumbent", "share": 20.0},
        {"workload": "default", "as": "incumbent", "share": 100},
    ]
    assert found["small"]["open_breakers"] == ["small:run-7"]
    assert found["small"]["parts"] == [
        {"workload": "desk", "as": "candidate", "share": 5, "mirror": 20.0, "adapter": "run-7"}
    ]
    assert found["gpt-4o"] == {"workloads": ["desk"]}


def test_a_limited_key_sees_its_models_and_no_more() -> None:
    """Whoever may use some models learns nothing of workloads, prices and rollouts."""
    limited = Key(number=1, digest="d", models=frozenset(("spare",)))
    assert models_of(TABLE, limited, []) == [{"id": "spare", "object": "model", "created": 0, "owned_by": "openai"}]
    assert [model["id"] for model in models_of(TABLE, Key(number=2, digest="d"), [])] == [*MODELS, "gpt-4o"]
    big = Key(number=3, digest="d", models=frozenset(("big",)))
    assert [model["id"] for model in models_of(TABLE, big, [])] == ["big", "gpt-4o"]


async def test_one_model_by_its_name(settings: MakeSettings) -> None:
    """Names may have slashes; what is not there is 404 in OpenAI's shape; nothing goes up."""
    routing = "version: 1\nmodels: {{a/b: {{upstream: nim, base_url: '{}', model: m}}}}\ndefault: {{serve: a/b}}\n"
    async with upstream(ok()) as fake, running(settings(routing.format(fake.url))) as gateway:
        found = await gateway.client.get("/v1/models/a/b")
        escaped = await gateway.client.get("/v1/models/a%2Fb")
        lost = await gateway.client.get("/v1/models/nothing")
    assert (found.status_code, found.json()["id"], escaped.json()) == (200, "a/b", found.json())
    assert (lost.status_code, lost.json()["error"]["code"], lost.json()["error"]["param"]) == (
        404, "model_not_found", "model",
    )  # fmt: skip
    assert fake.received == []
