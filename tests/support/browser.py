"""A page in headless Chromium over the DevTools protocol pipe; needs no package.

It returns sizes, console messages and screenshots.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
]
TROUBLE = (
    "Runtime.consoleAPICalled",
    "Runtime.exceptionThrown",
    "Log.entryAdded",
    "Network.requestWillBeSent",
    "Network.loadingFailed",
)


class Page:
    """One tab. events: the messages whose method is in TROUBLE."""

    def __init__(self, send: int, receive: int):
        self.send, self.receive, self.session, self.number, self.rest = send, receive, None, 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.send, json.dumps(message).encode() + b"\0")
        return self._until(lambda message: message.get("id") == self.number)["result"]

    def _until(self, is_awaited: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.receive, 1 << 16)
                assert part, "the browser is gone"
                self.rest += part
            first, _, self.rest = self.rest.partition(b"\0")
            message = json.loads(first)
            assert "error" not in message, message
            if message.get("method") in TROUBLE:
                self.events.append(message)
            if is_awaited(message):
                return message

    def open(self, path: Path) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._until(lambda message: message.get("method") == "Page.loadEventFired")

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """Write the full page as PNG."""
        path.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        )
        return path


@contextmanager
def browse(path: Path, profile: Path) -> Iterator[Page]:
    """Open a file in a browser. profile: a folder for the browser's data."""
    to_read, to_write = os.pipe(), os.pipe()  # it reads from 3 and writes to 4
    command = [str(BINARY), *QUIET, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    # A shell moves the descriptors, because Popen keeps their numbers. It is bash, because sh
    # supports only descriptors of one digit.
    line = ["bash", "-c", f'exec "$@" 3<&{to_read[0]} 4>&{to_write[1]}', "bash", *command]
    process = subprocess.Popen(
        line, pass_fds=(to_read[0], to_write[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_read[0])
    os.close(to_write[1])
    try:
        page = Page(to_read[1], to_write[0])
        page.open(path)
        yield page
    finally:
        os.close(to_read[1])
        try:
            process.wait(5)  # it leaves when the pipe closes
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_write[0])
