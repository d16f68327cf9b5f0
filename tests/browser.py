"""A headless Chromium that a test drives by DevTools' protocol over a pipe: no driver is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 60.0
_KEYS = {
    "ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Escape": 27,
    "Tab": 9,
}  # fmt: skip


def browser_path() -> str:
    """The browser of this machine; empty where there is none. MIXEDPREC_BROWSER names another."""
    named = os.environ.get("MIXEDPREC_BROWSER", "")
    return named or next(filter(None, map(shutil.which, NAMES)), "")


needs_browser = pytest.mark.skipif(
    not browser_path(), reason=f"needs a browser: {', '.join(NAMES)}, or MIXEDPREC_BROWSER"
)


class Browser:
    """One page of a headless Chromium.

    Args:
        folder: of its profile.

    Attributes:
        errors: what scripts of the page raised or wrote as errors.
        requests: addresses that the page asked for, the page's own and data aside.
    """

    def __init__(self, folder: Path) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        command = [
            browser_path(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-dev-shm-usage", f"--user-data-dir={folder}", "--remote-debugging-pipe",
            "--no-first-run", "--disable-background-networking", "about:blank",
        ]  # fmt: skip
        # it reads at 3 and writes at 4
        moved = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "browser", *command], pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._messages = ours_out, _messages(ours_in)
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        how = {"targetId": target, "flatten": True}
        self._session = self._call("Target.attachToTarget", how)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._out)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the protocol for the page."""
        return self._call(method, arguments, self._session)

    def open(self, path: Path) -> None:
        """Open a file, and wait until it is drawn."""
        self.call("Page.navigate", url=path.as_uri())
        self.wait(
            "document.readyState === 'complete' && document.querySelector('canvas')?.width > 0"
        )

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _SECONDS
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never came: {condition}"
            time.sleep(0.02)

    def look(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Set the size of the window, and which colours are preferred."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """Write what is seen, or the whole page, as PNG."""
        time.sleep(0.3)
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def click(self, x: float, y: float) -> None:
        """Move the pointer to a place in the window and click."""
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def move(self, x: float, y: float) -> None:
        """Move the pointer to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press a key by its name."""
        code = _KEYS[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode=code, **(text if kind == "keyDown" else {}),
            )  # fmt: skip

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def choose(self, selector: str, contains: str) -> None:
        """Choose an option of a select by its text, as a person does."""
        self.run(
            f"""(() => {{
                const select = document.querySelector({selector!r});
                const option = [...select.options].find((o) => o.text.includes({contains!r}));
                select.value = option.value;
                select.dispatchEvent(new Event("change", {{bubbles: true}}));
            }})()"""
        )

    def _call(
        self, method: str, arguments: Mapping[str, Any] | None = None, session: str = ""
    ) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments or {}}
        message |= {"sessionId": session} if session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        for answer in self._messages:
            self._note(answer)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
        raise AssertionError(f"the browser is gone, {method} was not answered")

    def _note(self, event: Mapping[str, Any]) -> None:
        """Keep what a good page never does."""
        found: dict[str, Callable[[Any], None]] = {
            "Runtime.exceptionThrown": lambda p: self.errors.append(
                str(p["exceptionDetails"].get("exception", {}).get("description", p))
            ),
            "Log.entryAdded": lambda p: self.errors.append(str(p["entry"]["text"])),
            "Network.requestWillBeSent": lambda p: self.requests.append(p["request"]["url"]),
        }
        if handle := found.get(event.get("method", "")):
            handle(event["params"])


def _messages(pipe: int) -> Iterator[dict[str, Any]]:
    rest = b""
    while data := os.read(pipe, 1 << 16):
        *whole, rest = (rest + data).split(b"\0")
        yield from map(json.loads, whole)
    os.close(pipe)
