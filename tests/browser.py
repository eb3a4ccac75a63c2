"""A headless Chromium over its DevTools pipe (--remote-debugging-pipe): no port and no package is needed."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60.0


def find_browser() -> str | None:
    """The first of NAMES that is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser. `problems` holds what the console, the page and the network complain of."""

    def __init__(self, program: str) -> None:
        self.home = tempfile.mkdtemp(prefix="stepline-browser-")
        to_it, self._out = os.pipe()
        self._in, from_it = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        options += [
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={self.home}",
            "about:blank",
        ]

        def as_3_and_4() -> None:  # the numbers that the browser reads from and writes to
            spare = [os.dup(fd) for fd in (to_it, from_it)]
            high = [os.dup2(fd, 10 + i) for i, fd in enumerate(spare)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [program, *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=as_3_and_4, close_fds=False, start_new_session=True,
        )  # fmt: skip
        os.close(to_it)
        os.close(from_it)
        self._late = threading.Timer(SECONDS, self._process.kill)  # its pipe then ends, and so does a read
        self._late.daemon = True
        self._late.start()
        self._number, self._read, self._session = 0, b"", None
        self.problems: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def open(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Shows a file in a window of CSS pixels; below 600 of width it is a phone's screen."""
        phone = width < 600
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        self._ask("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self._ask("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._hear(self._message())

    def value(self, script: str) -> Any:
        """What a JavaScript expression is worth on the page; a promise is waited for."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """What an expression is worth as soon as it is neither null nor empty."""
        again = f"() => {{ const found = {script}; if (found) done(found); else setTimeout(look, 5); }}"
        return self.value(f"new Promise((done) => {{ const look = {again}; look(); }})")

    def mouse(self, kind: str, x: float, y: float, buttons: int = 0) -> None:
        """kind: mousePressed, mouseMoved or mouseReleased, at CSS pixels of the window."""
        button = "none" if kind == "mouseMoved" and not buttons else "left"
        self._ask(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=1
        )

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """A PNG of the whole page, or of the window."""
        data = self._ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def close(self) -> None:
        """Ends the browser and removes its profile."""
        self._late.cancel()
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self.home, ignore_errors=True)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        left = json.dumps(message).encode() + b"\0"
        while left:
            left = left[os.write(self._out, left) :]
        while (answer := self._message()).get("id") != self._number:
            self._hear(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError(f"the browser has ended, or took more than {SECONDS:g} s")
            self._read += part
        text, self._read = self._read.split(b"\0", 1)
        return json.loads(text)

    def _hear(self, event: dict[str, Any]) -> None:
        name, what = event.get("method"), event.get("params", {})
        if name == "Page.loadEventFired":
            self._loaded = True
        elif name == "Runtime.exceptionThrown":
            self.problems.append(str(what["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.problems.append(str(what["args"]))
        elif name == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.problems.append(what["entry"]["text"])
        elif name == "Network.requestWillBeSent" and not what["request"]["url"].startswith(
            ("file:", "data:")
        ):
            self.problems.append(f"request of {what['request']['url'][:200]}")
