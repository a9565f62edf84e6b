"""A real browser for tests: Debian's chromium without a window, told what to do by the DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # as root, in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-port=0",
)


def find_chromium() -> str | None:
    """The program, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """One page of the browser. Every message that the page causes is kept."""

    def __init__(self, address: str) -> None:
        from websockets.sync.client import connect

        self.socket = connect(address, max_size=None, proxy=None, open_timeout=START_S)
        self.events: list[dict[str, Any]] = []
        self._last = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Performance.enable", timeDomain="threadTicks")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._last += 1
        self.socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=START_S))
            if "method" in message:
                self.events.append(message)
            elif message["id"] == self._last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a page afresh, and wait until it has drawn itself."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri() + fragment)
        self.wait_for("document.documentElement?.dataset.ready === 'true'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, once it is there if it is a promise."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", "the page failed"))
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = START_S) -> None:
        """Wait until an expression is true. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(RuntimeError):  # between two pages there is nobody to ask
                if self.evaluate(f"Boolean({expression})"):
                    return
            time.sleep(0.02)
        raise TimeoutError(f"never true: {expression}; {self.complaints()}")

    def press(self, key: str) -> None:
        """Press and release a key, where the focus is."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Escape": 27, "Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38}
        code |= {"ArrowRight": 39, "ArrowDown": 40, "PageUp": 33, "PageDown": 34}
        for kind in ("keyDown", "keyUp"):
            number = code.get(key, ord(key[0].upper()))
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=number,
                      **(text if kind == "keyDown" else {}))  # fmt: skip

    def hover(self, selector: str) -> None:
        """Put the pointer on the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)}).getClientRects()[0].toJSON()"
        self.evaluate(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")
        at = self.evaluate(box)
        self.call(
            "Input.dispatchMouseEvent", type="mouseMoved", x=at["x"] + at["width"] / 2, y=at["y"] + at["height"] / 2
        )

    def look(self, *, width: int = 1440, height: int = 900, scheme: str = "light") -> None:
        """Give the window a size, and the system a colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """What the window shows, or the whole page, as a PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))

    def busy_s(self) -> float:
        """Seconds of processor time that the page's thread has worked so far: waiting for others is none of it."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def complaints(self) -> list[str]:
        """Errors, warnings and violations of the policy that the page has caused."""
        found: list[str] = []
        for event in self.events:
            about = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(about["exceptionDetails"].get("exception", {}).get("description", "an exception"))
            elif event["method"] == "Log.entryAdded":
                found.append(about["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(f"console.{about['type']}")
            elif event["method"] == "Page.javascriptDialogOpening":
                found.append(f"dialog: {about['message']}")
        return found

    def requests(self) -> list[str]:
        """Addresses that the page has asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]


@contextlib.contextmanager
def chromium_tab() -> Iterator[Tab]:
    """A tab of a browser of its own, which ends with it. Raises RuntimeError if it does not start."""
    program = find_chromium()
    if program is None:
        raise RuntimeError("there is no chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        quiet = subprocess.DEVNULL
        command = [program, *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
        browser = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
        try:
            with Tab(_address(Path(folder) / "DevToolsActivePort", browser)) as tab:
                yield tab
        finally:
            browser.terminate()
            try:
                browser.wait(10)
            except subprocess.TimeoutExpired:
                browser.kill()
                browser.wait()


def _address(port_file: Path, browser: subprocess.Popen[bytes]) -> str:
    """Where the browser's first tab listens."""
    until = time.monotonic() + START_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < until and browser.poll() is None:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            port = int(port_file.read_text().split("\n")[0])
            with opener.open(f"http://127.0.0.1:{port}/json/list", timeout=START_S) as answer:
                return next(tab["webSocketDebuggerUrl"] for tab in json.load(answer) if tab["type"] == "page")
        time.sleep(0.05)
    raise RuntimeError(f"chromium did not start; its exit code: {browser.poll()}")
