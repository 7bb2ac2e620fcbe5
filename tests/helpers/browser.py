"""A page in headless Chromium that a test can click: the DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.report_pages import CHROMIUM

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--remote-debugging-pipe")  # fmt: skip


class Browser:
    """A tab of Chromium.

    Attributes:
        problems: what the console said of errors and warnings, and exceptions that no script caught.
    """

    def __init__(self, to_browser: int, from_browser: int):
        """Open a tab. to_browser, from_browser: file descriptors."""
        self.to_browser, self.from_browser, self.left = to_browser, from_browser, b""
        self.ids, self.session, self.problems = itertools.count(1), None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params) -> dict:
        """Send a command and return its result. Messages end with a NUL byte."""
        message = {"id": next(self.ids), "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != message["id"]:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, scheme: str, width: int = 1200, height: int = 2400) -> None:
        """Load a page in a color scheme, "light" or "dark"."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)  # fmt: skip
        self.send("Page.navigate", url=page.as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page. The policy of the page does not apply."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, file: Path) -> Path:
        """Write a picture of the page as PNG."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
        return file

    def move_pointer(self, x: float, y: float) -> None:
        """Move the pointer to a position in pixels of the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def _receive(self) -> dict:
        """Return the next message; note what it says of problems."""
        while b"\0" not in self.left:
            read = os.read(self.from_browser, 2**20)
            assert read, "the browser has ended"
            self.left += read
        text, _, self.left = self.left.partition(b"\0")
        message = json.loads(text)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded") or (
            message.get("method") == "Runtime.consoleAPICalled" and message["params"]["type"] != "log"
        ):
            self.problems.append(message["params"])
        return message


@contextlib.contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with a profile in `folder`, and end it afterwards."""
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
    # Chromium reads from descriptor 3 and writes to 4; the shell moves the pipes there.
    moved = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
    process = subprocess.Popen(
        ["bash", "-c", moved, "bash", str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}/profile"],
        pass_fds=(read_commands, write_answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(read_commands)
    os.close(write_answers)
    try:
        browser = Browser(commands, answers)
        yield browser
        browser.session = None
        browser.send("Browser.close")
    finally:
        os.close(commands)
        os.close(answers)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
