"""Chromium on one page, spoken to over pipes in the DevTools protocol: no driver, no port."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Where it is 1, a missing browser is a failure.
REQUIRED = "CI_BROWSER"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
    "--remote-debugging-pipe",
)
# Longest silence; a browser starts slowly on a busy machine.
SECONDS = 120


def find_chromium() -> str:
    """Its path; without one the test is skipped, or fails."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1, but there is no chromium on the path")
    if found is None:
        pytest.skip("there is no chromium on the path (apt-get install chromium)")
    return found


class Page:
    """One page of a browser.

    Attributes:
        events: what the browser told of the page since it was opened, in order.
    """

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._in, self._out = incoming, outgoing
        self.events: list[dict[str, Any]] = []
        self._buffer, self._last_id, self._session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last_id:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        """Go to ``url`` and wait until it has loaded."""
        self.events = []
        loader = self.call("Page.navigate", url=url)["loaderId"]
        loaded = {"name": "load", "loaderId": loader}
        while not any(loaded.items() <= told.items() for told in self.told("Page.lifecycleEvent")):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page; None if it has none."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """Parameters of the events of these names."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def errors(self) -> list[dict[str, Any]]:
        """What stands in the console, and exceptions."""
        return self.told("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")

    def requests(self) -> list[str]:
        """Addresses that were asked for, the page's own among them; what is in the page itself is left out."""
        urls = [told["request"]["url"] for told in self.told("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser said nothing for {SECONDS} s"
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser(profile: Path, width: int, height: int) -> Iterator[Page]:
    """A page in a browser of its own, whose window is so many pixels large."""
    command = [find_chromium(), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    # It reads from its descriptor 3 and writes to 4; the pipes stay clear of both.
    ends = [end for _ in range(2) for end in os.pipe()]
    their_in, outgoing, incoming, their_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    shell = ["bash", "-c", f'exec "$@" 3<&{their_in} 4>&{their_out}', "bash", *command]
    process = subprocess.Popen(shell, pass_fds=(their_in, their_out), stderr=subprocess.DEVNULL)
    os.close(their_in)
    os.close(their_out)
    try:
        yield Page(incoming, outgoing)
    finally:
        # It ends when no one speaks to it any more.
        os.close(outgoing)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(incoming)
