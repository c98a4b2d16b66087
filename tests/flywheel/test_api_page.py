"""The page in a real browser: a person sees where rollouts stand, presses a button, and the state changes."""

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gateway.auth import Scope
from routing.evidence import Gate, Slices, Verdict, read
from routing.rollout import Observed, State
from tests.browser import CHROMIUM, Page, browser
from tests.flywheel.control import START, Plane, served
from tests.routing.examples import reading

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

SLICED = Gate(metric="tool_name", kind="guard", threshold=0.8, slices=Slices(floor=0.7, classes=("pay", "refund")))
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>'\"&amp;"


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Page]:
    async with browser(tmp_path) as page:
        yield page
        assert page.complaints == []


async def see(plane: Plane, name: str) -> None:
    """The controller looks."""
    sliced = read(SLICED, 30, 32, {"pay": (29, 30), "refund": (1, 2)})
    seen = Observed(readings=(reading(Verdict.RUNNING), sliced), pairs=32)
    await plane.rollouts.apply(name, seen, who="controller", why="", now=5.0)


async def do(page: Page, verb: str, why: str) -> None:
    """Press the button of a verb, say why, and confirm."""
    await page.press(f"button[data-verb={verb}]")
    await page.until("document.activeElement.id === 'why'")
    await page.write(why)
    await page.press("#confirm")
    await page.until("!document.getElementById('ask').open")


async def in_state(page: Page, state: str) -> None:
    await page.until(f"document.querySelector('section[data-state={state}]') !== null")


async def test_what_is_pressed_happens_and_what_happens_is_seen(tmp_path: Path, tab: Page) -> None:
    async with served(tmp_path) as plane:
        await tab.open(plane.url)
        await tab.until("document.body.innerText.includes('No rollout is under way.')")
        name = await plane.start()
        await see(plane, name)
        await in_state(tab, "shadow")
        shown = await tab.text("#live")
        for text in (
            "small-1b:a1",
            "waiting for evidence: tool_name",
            "32 of 200 pairs",
            "at least 0.8",
            "running",
            "0.800",
            "tool_name: too few pairs yet of 1 of 2 classes: refund (2)",
            "wanted 0 %, nothing has come in since this step began",
            "the controller looked",
        ):
            assert text in shown, text
        assert await tab.text("li.now") == "shadow"
        assert await tab.run("document.querySelectorAll('svg .whisker, svg .estimate, svg .floor').length") == 10
        await do(tab, "pause", "release freeze")
        await in_state(tab, "paused")
        paused = await plane.rollouts.get(name)
        assert paused.state is State.PAUSED
        await tab.press("summary")
        await tab.until("document.body.innerText.includes('release freeze')")
        await do(tab, "resume", "")
        await in_state(tab, "shadow")
        await tab.press("button[data-verb=promote]")
        await tab.press("#full")
        await tab.press("#confirm")
        await in_state(tab, "promoted")
        assert (await plane.rollouts.get(name)).state is State.PROMOTED
        await do(tab, "undo", "complaint")
        await tab.until("document.getElementById('ended').innerText.includes('undone')")
        history = await plane.rollouts.history(rollout_id=name)
        assert [(entry.event, entry.who, entry.why) for entry in history][1:] == [
            ("paused", "page", "release freeze"),
            ("resumed", "page", ""),
            ("promoted", "page", ""),
            ("aborted", "page", "complaint"),
        ]


async def test_command_api_and_page_leave_the_same_history(tmp_path: Path, tab: Page) -> None:
    """But for the ids, the moment and who asked."""
    told: dict[str, list[dict[str, Any]]] = {}
    async with served(tmp_path) as plane:
        await tab.open(plane.url)
        for way in ("command", "api", "page"):
            name = await plane.start()
            if way == "command":
                assert (await plane.command("rollout", "pause", name, "--why", "freeze", "--who", way)).exit_code == 0
                assert (await plane.command("rollout", "abort", name, "--why", "enough", "--who", way)).exit_code == 0
            elif way == "api":
                assert (await plane.post(f"/api/rollouts/{name}/pause", why="freeze")).status_code == 200
                assert (await plane.post(f"/api/rollouts/{name}/abort", why="enough")).status_code == 200
            else:
                await do(tab, "pause", "freeze")
                await in_state(tab, "paused")
                await do(tab, "abort", "enough")
            entries = (await plane.rollouts.history(rollout_id=name))[1:]
            assert {entry.who for entry in entries} == {way}
            told[way] = [
                {key: value for key, value in asdict(entry).items() if key not in ("id", "rollout_id", "at", "who")}
                for entry in entries
            ]
    assert told["command"] == told["api"] == told["page"]
    assert len(told["page"]) == 2


async def test_what_others_wrote_is_text(tmp_path: Path, tab: Page) -> None:
    async with served(tmp_path) as plane:
        reply = await plane.post("/api/rollouts", **START | {"candidate": f"small-1b:{HOSTILE}"}, who=HOSTILE)
        name = reply.json()["id"]
        await plane.post(f"/api/rollouts/{name}/abort", why=HOSTILE, who=HOSTILE)
        reply = await plane.post("/api/rollouts", **START | {"candidate": f"small-1b:{HOSTILE}"}, who=HOSTILE)
        await tab.open(plane.url)
        await in_state(tab, "shadow")
        await tab.press("#ended summary")
        await tab.until("document.querySelectorAll('#ended details tbody tr').length === 2")
        assert (await tab.text()).count(HOSTILE) >= 6
        assert await tab.run("document.title") == "Understudy: rollouts"
        assert await tab.run("document.querySelectorAll('img, script').length") == 1


async def test_a_key_is_asked_for_and_kept_in_the_tab_alone(tmp_path: Path, tab: Page) -> None:
    async with served(tmp_path, "[gateway]", 'auth = "on"') as plane:
        admin, data = await plane.secret("ann"), await plane.secret("shop", Scope.DATA)
        plane.client.headers["authorization"] = f"Bearer {admin}"
        await plane.start()
        await tab.open(plane.url)
        for secret, says in (("us-wrong", "the key is not valid"), (data, "needs the scope admin")):
            await tab.press("#key")
            await tab.write(secret)
            await tab.press("#door button")
            await tab.until(f"document.getElementById('told').innerText.includes({json.dumps(says)})")
        assert "support-router" not in await tab.text()
        await tab.press("#key")
        await tab.write(admin)
        await tab.press("#door button")
        await in_state(tab, "shadow")
        await do(tab, "pause", "as ann")
        assert (await plane.rollouts.history())[-1].who == "ann"
        assert await tab.run("[localStorage.length, sessionStorage.getItem('key'), document.cookie]") == [0, admin, ""]
        assert admin not in await tab.run("document.documentElement.outerHTML")
        await plane.post("/api/keys/key-1/revoke")
        await tab.until("!document.getElementById('door').hidden")
        assert await tab.run("sessionStorage.length") == 0
        assert "support-router" not in await tab.text()


async def test_what_moved_since_it_was_shown_is_told_first(tmp_path: Path, tab: Page) -> None:
    """Another step is told; another reason to wait for alone holds nobody up."""
    async with served(tmp_path) as plane:
        name = await plane.start()
        await tab.open(plane.url)
        await tab.press("button[data-verb=promote]")
        await see(plane, name)
        await tab.press("#confirm")
        await tab.until("!document.getElementById('ask').open")
        assert (await plane.rollouts.get(name)).approved == 0
        await tab.press("button[data-verb=pause]")
        await plane.post(f"/api/rollouts/{name}/promote", full=True)
        await tab.press("#confirm")
        await tab.until("document.getElementById('refused').innerText.includes('Meanwhile it is promoted, step 3')")
        await tab.press("#cancel")
        await in_state(tab, "promoted")
        assert (await plane.rollouts.history())[-1].event == "promoted"
