"""A real Chromium without a window, spoken to over its DevTools pipe: opens pages and asks what they look like."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
_PATIENCE_S = 60.0


@dataclass(slots=True)
class Browser:
    """The two ends of the pipe, and every event that came over it."""

    to: int
    back: int
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    _asked: int = 0
    _unread: bytes = b""

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command; raises AssertionError when it fails."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._asked:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self.back], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self.back, 1 << 16)
            assert more, "the browser is gone"
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(message))

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Show a page at a width in CSS pixels, in a light or a dark scheme, and wait until it is there."""
        self.events.clear()
        phone = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, script: str) -> Any:
        """The JSON value of an expression in the page."""
        found = self.ask("Runtime.evaluate", expression=f"JSON.stringify({script})", returnByValue=True)
        assert "exceptionDetails" not in found, found
        return json.loads(found["result"]["value"])

    def press(self, key: str) -> None:
        """A key, down and up."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for what in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=what, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def happened(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of events of these kinds since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") in methods]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own; skips the test where none is installed."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser to look with: none of {', '.join(_NAMES)} is installed")
    (its_in, to), (back, its_out) = os.pipe(), os.pipe()
    # the pipe's ends must be descriptors 3 and 4: a shell moves them there
    command = f'exec "$0" "$@" 3<&{its_in} 4>&{its_out} </dev/null >/dev/null 2>&1'
    started = subprocess.Popen(
        ["/bin/bash", "-c", command, program, *_FLAGS, f"--user-data-dir={profile}"], pass_fds=(its_in, its_out)
    )
    os.close(its_in)
    os.close(its_out)
    try:
        shown = Browser(to, back)
        target = shown.ask("Target.createTarget", url="about:blank")["targetId"]
        shown.session = shown.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network", "Accessibility"):
            shown.ask(f"{domain}.enable")
        yield shown
    finally:
        started.terminate()
        started.wait(timeout=_PATIENCE_S)
        os.close(to)
        os.close(back)
