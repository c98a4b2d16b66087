"""A headless Chromium that tests drive as a person would: it opens a page, types, presses, and reads what is shown.

It speaks the DevTools protocol over a pipe (`--remote-debugging-pipe`): JSON messages that a zero byte ends, which the
browser reads from descriptor 3 and writes to 4.
"""

import asyncio
import itertools
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM", "Page", "browser"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
    "--no-first-run", "--window-size=1200,1600", "--remote-debugging-pipe",
)  # fmt: skip
_PUT_PIPES = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_PATIENCE = 60.0


class Page:
    """One tab. `complaints` are errors of its scripts, and what its policy kept it from."""

    def __init__(self, write: asyncio.StreamWriter, read: asyncio.StreamReader) -> None:
        self._write = write
        self._read = read
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._session: str | None = None
        self.complaints: list[str] = []

    async def listen(self) -> None:
        """Take in what the browser says, until it ends."""
        with suppress(asyncio.IncompleteReadError):
            while True:
                said = json.loads((await self._read.readuntil(b"\0"))[:-1])
                if said.get("id") in self._waiting:
                    self._waiting.pop(said["id"]).set_result(said)
                elif said.get("method") == "Runtime.exceptionThrown":
                    self.complaints.append(json.dumps(said["params"]["exceptionDetails"]))
                elif said.get("method") == "Log.entryAdded" and said["params"]["entry"]["source"] != "network":
                    self.complaints.append(said["params"]["entry"]["text"])

    async def tell(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._waiting[number] = asyncio.get_running_loop().create_future()
        self._write.write(json.dumps(message).encode() + b"\0")
        said = await asyncio.wait_for(self._waiting[number], _PATIENCE)
        assert "error" not in said, said
        found: dict[str, Any] = said["result"]
        return found

    async def attach(self) -> None:
        """Open the tab."""
        target = (await self.tell("Target.createTarget", url="about:blank"))["targetId"]
        self._session = (await self.tell("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.tell(f"{domain}.enable")

    async def open(self, url: str) -> None:
        await self.tell("Page.navigate", url=url)
        await self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    async def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        said = await self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until the expression is true; its value."""
        async with asyncio.timeout(_PATIENCE):
            while not (found := await self.run(expression)):
                await asyncio.sleep(0.05)
        return found

    async def press(self, selector: str) -> None:
        """Wait for an element, and press the mouse's button on its middle; again where it moved away meanwhile."""
        name = json.dumps(selector)
        async with asyncio.timeout(_PATIENCE):
            while True:
                await self.until(f"document.querySelector({name})?.checkVisibility()")
                middle = await self.run(
                    f"(e => e && (e.scrollIntoView({{block: 'center'}}), (r => [r.x + r.width / 2, r.y + r.height / 2])"
                    f"(e.getBoundingClientRect())))(document.querySelector({name}))"
                )
                if middle is None:
                    continue
                x, y = middle
                await self._mouse("mousePressed", x, y)
                if await self.run(f"Boolean(document.elementFromPoint({x}, {y})?.closest({name}))"):
                    await self._mouse("mouseReleased", x, y)
                    return
                await self._mouse("mouseReleased", 0, 0)
                await self.run("getSelection().removeAllRanges()")

    async def _mouse(self, kind: str, x: float, y: float) -> None:
        await self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def write(self, text: str) -> None:
        """Type into whatever has the focus."""
        await self.tell("Input.insertText", text=text)

    async def text(self, selector: str = "body") -> str:
        return str(await self.run(f"document.querySelector({json.dumps(selector)}).innerText"))


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Page]:
    """A browser with one tab; its profile lies in `folder`."""
    to_browser, from_browser = os.pipe(), os.pipe()
    inherited = (to_browser[0], from_browser[1])
    options = [*_OPTIONS, f"--user-data-dir={folder / 'profile'}"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PUT_PIPES, *map(str, inherited), str(CHROMIUM), *options, "about:blank",
        pass_fds=inherited, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    for end in inherited:
        os.close(end)
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=2**26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(from_browser[0], "rb"))
    transport, protocol = await loop.connect_write_pipe(
        asyncio.streams.FlowControlMixin, os.fdopen(to_browser[1], "wb")
    )
    page = Page(asyncio.StreamWriter(transport, protocol, None, loop), reader)
    listening = asyncio.ensure_future(page.listen())
    try:
        await page.attach()
        yield page
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        await process.wait()
        await listening
        transport.close()
