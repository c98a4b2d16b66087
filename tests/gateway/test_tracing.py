"""A call's place in a trace: W3C context taken in and passed on, held against OpenTelemetry's own propagator."""

from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.signals import Sampling
from gateway.tracing import SpooledEnd, SpooledTrace, Tracing
from routing.targets import Model, Ref, Target

HEX = st.text("0123456789abcdef", min_size=1, max_size=34)
CALLER = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TARGET = Target(
    model=Model(name="prod", upstream="nim", base_url="https://nim.test/v1", model="big"),
    ref=Ref(model="prod"),
    name="prod",
)


def begun(*headers: tuple[bytes, bytes]) -> tuple[dict[str, object], list[tuple[bytes, bytes]]]:
    """What the log keeps of a call with these headers, and the headers that its first try takes up."""
    trace, told = Tracing(Sampling()).begin(headers), {}
    trace.begin_log(told)
    carried = [(b"accept", b"*/*"), *headers]
    trace.tried(0.0, TARGET)
    trace.carry(carried)
    return told, carried


@given(
    version=HEX.map(lambda text: text[:2]),
    trace=HEX,
    span=HEX.map(lambda text: text[:17]),
    flags=HEX.map(lambda text: text[:2]),
    rest=st.sampled_from(["", "-", "-x", "x"]),
)
@example("00", "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "01", "")
@example("00", "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "01", "-x")
@example("cc", "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "01", "-x")
@example("ff", "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "01", "")
@example("00", "0" * 32, "b7ad6b7169203331", "01", "")
@example("00", "0af7651916cd43dd8448eb211c80319c", "0" * 16, "01", "")
def test_a_context_is_read_as_the_sdk_reads_it(version: str, trace: str, span: str, flags: str, rest: str) -> None:
    """The same headers are a parent, and the others are none."""
    value = f"{version}-{trace}-{span}-{flags}{rest}"
    theirs = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": value})).get_span_context()
    ours = Tracing(Sampling()).begin([(b"traceparent", value.encode())])
    assert (ours.trace_id == f"{theirs.trace_id:032x}") == theirs.is_valid


def test_the_upstream_s_parent_is_our_try() -> None:
    """The trace and its state go on, the caller's span does not."""
    told, carried = begun((b"traceparent", CALLER), (b"tracestate", b"a=1"), (b"tracestate", b"b=2"))
    span = SpooledTrace(*told["span"])
    assert told["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert (span.parent, span.state) == ("b7ad6b7169203331", "a=1,b=2")
    ours = b"00-0af7651916cd43dd8448eb211c80319c-%016x-01" % (span.span_id + 1)
    assert carried == [(b"accept", b"*/*"), (b"tracestate", b"a=1"), (b"tracestate", b"b=2"), (b"traceparent", ours)]


def test_a_context_that_is_none_goes_no_further() -> None:
    """Neither it nor the state that came with it; two of them are none."""
    for wrong in ([(b"traceparent", b"nonsense")], [(b"traceparent", CALLER)] * 2, []):
        told, carried = begun(*wrong, (b"tracestate", b"a=1"))
        assert SpooledTrace(*told["span"])[1:3] == ("", "")
        assert [name for name, _ in carried] == [b"accept", b"traceparent"]
        assert str(told["trace_id"]).encode() in carried[-1][1]


def test_what_is_not_sampled_says_so_upstream() -> None:
    """It has a trace all the same, for the log; nothing is kept for spans."""
    told, carried = begun((b"traceparent", CALLER[:-1] + b"0"))
    assert told == {"trace_id": "0af7651916cd43dd8448eb211c80319c"}
    assert carried[-1][1].endswith(b"-00")


def test_each_try_is_a_span_of_its_own() -> None:
    """With its beginning, its target, and why it failed."""
    trace, told, carried = Tracing(Sampling()).begin([]), {}, []
    for cause in ("connect", ""):
        trace.tried(1.0, TARGET)
        if cause:
            trace.failed(cause)
        trace.carry(carried)
    trace.begin_log(told)
    trace.end_log(told)
    end = SpooledEnd(*told["span_end"])
    parents = [int(value.split(b"-")[2], 16) for _, value in carried]
    assert parents == [told["span"][0] + 1, told["span"][0] + 2]
    assert [one[1:] for one in end.tries] == [
        ("prod", "nim", "big", "nim.test", 443, "connect"),
        ("prod", "nim", "big", "nim.test", 443, ""),
    ]


def test_a_mirror_has_a_trace_of_its_own() -> None:
    """That names its original, and is sampled as that is."""
    trace, told, copied = Tracing(Sampling()).begin([(b"traceparent", CALLER)]), {}, {}
    trace.begin_log(told)
    trace.copied().begin_log(copied)
    assert copied["trace_id"] != told["trace_id"]
    assert SpooledTrace(*copied["span"]).link == (told["trace_id"], told["span"][0])
    unsampled: dict[str, object] = {}
    Tracing(Sampling(bound=0)).begin([]).copied().begin_log(unsampled)
    assert "span" not in unsampled
