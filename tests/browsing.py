"""A real browser without a window, asked through two pipes; no package is needed for it.

Knows no page. The browser is Chromium, found by name or through the variable CHROMIUM.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str | None:
    """Where a browser is, if there is one."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page in the browser. `said`: what it wrote to its console, and errors."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back, self.rest, self.number = to, back, b"", 0
        self.session: str | None = None
        self.said: list[str] = []
        self.seen: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> Any:
        """Call a method of the browser's protocol and wait for its answer."""
        self.number += 1
        content: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            content["sessionId"] = self.session
        os.write(self.to, json.dumps(content).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, file: Path) -> None:
        """Go to a file, and wait until it is there."""
        self.ask("Page.navigate", url=file.absolute().as_uri())
        until = time.monotonic() + 30
        while self.run("document.readyState") != "complete" or self.run("location.protocol") != "file:":
            assert time.monotonic() < until
            time.sleep(0.05)

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            piece = os.read(self.back, 2**16)
            assert piece, "the browser has gone"
            self.rest += piece
        line, _, self.rest = self.rest.partition(b"\0")
        content: dict[str, Any] = json.loads(line)
        method, params = content.get("method"), content.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(params))
        if method == "Network.requestWillBeSent":
            self.seen.append(params["request"]["url"])
        return content


@contextmanager
def browser(path: str, profile: Path) -> Iterator[Tab]:
    """Start it, and end it afterwards."""
    there, to = os.pipe()
    back, from_it = os.pipe()
    line = f'exec "$0" "$@" 3<&{there} 4>&{from_it}'
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}")
    process = subprocess.Popen(
        ["bash", "-c", line, path, *options],
        pass_fds=(there, from_it),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(there)
    os.close(from_it)
    try:
        yield Tab(to, back)
    finally:
        process.terminate()
        process.wait(20)
        os.close(to)
        os.close(back)
