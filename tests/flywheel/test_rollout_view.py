"""How a rollout's gates are shown: figures, what is wanted, and the classes that are short of data, by name."""

from dataclasses import replace

from rich.console import Console

from flywheel.cli.rollout_gates import expectations
from flywheel.cli.rollout_view import panel
from flywheel.status import View, as_json
from routing.codec import observed_from_dict, observed_to_dict
from routing.evidence import Gate, Slices, Sums, read, read_sums
from routing.rollout import Observed
from tests.flywheel.test_observe import NOW, ROLLOUT

SLICED = Gate(metric="tool_name", kind="guard", threshold=0.8, slices=Slices(floor=0.7, classes=("pay", "refund")))
COST = Gate(metric="cost_usd", kind="guard", threshold=0.5, against="incumbent", ratio=0.5, reference=0.01, bound=0.1)
SEEN = Observed(
    readings=(
        read(SLICED, 95, 100, {"pay": (92, 95), "refund": (3, 5)}),
        read_sums(COST, Sums(n=50, total=0.1, sizes=0.1, squares=0.01)),
    ),
    pairs=100,
)
VIEW = View(rollout=ROLLOUT, seen=(NOW, SEEN))


def shown() -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(panel(VIEW, NOW))
    return captured.get()


def test_the_panel_says_what_each_gate_wants_and_which_classes_are_scarce() -> None:
    text = shown()
    assert "0.000200" in text
    assert "at most 0.5x the incumbent's" in text
    assert "tool_name: too few pairs yet of 1 of 2 classes: refund (5)" in text


def test_readings_survive_storage_and_older_ones_are_read() -> None:
    stored = observed_to_dict(SEEN)
    assert observed_from_dict(stored) == SEEN
    for reading in stored["readings"]:
        del reading["slices"], reading["wanted"]
    assert observed_from_dict(stored).readings[0].slices == ()
    assert as_json(ROLLOUT, VIEW)["observed"]["readings"][0]["slices"][1]["name"] == "refund"


def test_expectations_of_every_kind_of_gate() -> None:
    pairs = Gate(metric="format_valid", kind="prove", threshold=-0.03, against="incumbent", margin=0.03, horizon=500)
    hopeless = Gate(metric="tool_name", kind="prove", threshold=0.9999999, alpha=1e-9)
    told = expectations(replace(ROLLOUT.policy, gates=(SLICED, COST, pairs, hopeless))).splitlines()
    assert told[0].startswith("  tool_name (guard): holds from 20 pairs on; a candidate at 0.6 is ended after about ")
    assert "a candidate at twice the cost is ended" in told[1]
    assert "(at its horizon of 500 a person decides); one worse by 0.06 is ended after about" in told[2]
    assert "passes after about endlessly many pairs" in told[3]
