"""A page in a headless Chromium, driven through its DevTools protocol by the client that Lightning brings along.

Selenium and Playwright would do the same with a driver or a browser of their own, which is more to install than to do.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    "--remote-debugging-port=0",
)
LONGEST_MESSAGE = 2**28


class Page:
    """The only page of a browser that ends with the block; scripts are JavaScript expressions."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._runner = asyncio.Runner()

    def __enter__(self) -> Page:
        assert PROGRAM is not None
        # Chromium's sandbox refuses root
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [PROGRAM, *OPTIONS, *as_root, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._runner.run(self._connect())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            self._runner.run(self._session.close())
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._runner.close()

    async def _connect(self) -> None:
        self._session = aiohttp.ClientSession()
        port = await self._port()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (address,) = [tab["webSocketDebuggerUrl"] for tab in await answer.json() if tab["type"] == "page"]
        self._socket = await self._session.ws_connect(address, max_msg_size=LONGEST_MESSAGE)
        await self._call("Page.enable")

    async def _port(self) -> str:
        for _ in range(600):
            with contextlib.suppress(FileNotFoundError, IndexError):
                return (self._folder / "DevToolsActivePort").read_text().split()[0]
            assert self._process.poll() is None, f"{PROGRAM} ended with code {self._process.returncode}"
            await asyncio.sleep(0.1)
        raise AssertionError(f"{PROGRAM} opens no port")

    async def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            said = json.loads(await self._socket.receive_str(timeout=120))
            # what is no answer is an event
            if said.get("id") == self._number:
                assert "error" not in said, f"{method}: {said['error']['message']}"
                return said["result"]

    def open(self, address: str) -> None:
        """Begin to load a page."""
        self._runner.run(self._call("Page.navigate", url=address))

    def look(self, *, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        """Set the size of the window and whether its user prefers dark pages."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._runner.run(self._call("Emulation.setDeviceMetricsOverride", **size))
        self._runner.run(self._call("Emulation.setEmulatedMedia", features=[scheme]))

    def value(self, script: str) -> Any:
        """Return what an expression is; an element is an empty dict."""
        found = self._runner.run(self._call("Runtime.evaluate", expression=script, returnByValue=True))
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, script: str, seconds: float = 300.0) -> Any:
        """Return what an expression is as soon as that is true in JavaScript's sense."""
        until = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < until, f"waited in vain for {script}; the page says:\n{self.text()[-1500:]}"
            time.sleep(0.2)
        return found

    def click(self, script: str) -> None:
        """Click where an element is, once it is there and stands still; it is scrolled to."""
        place = (
            "(element => { if (!element) return null;"
            " element.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const box = element.getBoundingClientRect();"
            f" return box.width ? [box.x + box.width / 2, box.y + box.height / 2] : null }})({script})"
        )
        former = None
        # a page that still scrolls to where the last click led takes the element away from under the mouse
        while (found := self.wait_for(place)) != former:
            former = found
            time.sleep(0.1)
        x, y = found
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            mouse = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self._runner.run(self._call("Input.dispatchMouseEvent", **mouse))

    def text(self) -> str:
        """Return what can be read on the page."""
        return str(self.value("document.body ? document.body.innerText : ''"))

    def wait_for_texts(self, *texts: str) -> str:
        """Return what can be read on the page once all of these can."""
        self.wait_for(f"{json.dumps(texts)}.every(text => document.body && document.body.innerText.includes(text))")
        return self.text()

    def screenshot(self, path: Path) -> None:
        """Take a picture of what is in the window."""
        path.write_bytes(base64.b64decode(self._runner.run(self._call("Page.captureScreenshot"))["data"]))
