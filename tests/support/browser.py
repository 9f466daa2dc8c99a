"""Opens a page of a local file in headless Chromium and says what it shows."""

import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Debian's package of this name has it.
BROWSER = "chromium-headless-shell"
#: Seconds that a page may take, on a slow and busy machine.
_LIMIT = 120

#: Runs in the page: whether pictures have pixels, and whether each video can be played and sought.
_LOOK = """
(async () => {
  const videos = [];
  for (const video of document.querySelectorAll("video")) {
    const sought = new Promise((resolve, reject) => {
      video.onseeked = resolve; video.onerror = () => reject(video.error.message);
    });
    try {
      await video.play(); video.pause(); video.currentTime = video.duration / 2; await sought;
      videos.push({width: video.videoWidth, at: video.currentTime});
    } catch (fault) { videos.push({width: 0, at: 0, fault: String(fault)}); }
  }
  const pictures = [...document.images].map(one => one.complete ? one.naturalWidth : 0);
  const charts = [...document.querySelectorAll("svg")].map(one => one.getBoundingClientRect().width);
  return {title: document.title, pictures, charts, videos, height: document.body.scrollHeight};
})()
"""


@dataclass(frozen=True)
class SeenPage:
    """What a browser showed.

    Args:
        title: of the page.
        pictures: width of each picture in its own pixels; 0 for one that did not load.
        charts: width of each inline chart on the page.
        videos: `width` and `at`, the place in seconds that was sought, of each video, and its `fault`.
        height: of the page in pixels.
        errors: exceptions of scripts, and what could not be loaded.
    """

    title: str
    pictures: list[float]
    charts: list[float]
    videos: list[dict]
    height: float
    errors: list[str]


class _Browser:
    """A browser that is told what to do by the DevTools protocol over a pair of pipes.

    Args:
        scratch: folder for the browser's own files.
    """

    def __init__(self, scratch: Path) -> None:
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        command = [
            str(shutil.which(BROWSER)), "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required",
            f"--user-data-dir={scratch / 'browser'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--remote-debugging-pipe",
        ]  # fmt: skip
        # The browser reads from file 3 and writes to file 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{answers}', "bash", *command], pass_fds=(theirs, answers),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HOME": str(scratch)},
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self._left, self._number, self._deadline = b"", 0, time.monotonic() + _LIMIT
        self.events: list[dict] = []
        self.session: str | None = None

    def call(self, method: str, **parameters: Any) -> dict:
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if self.session is None else {"sessionId": self.session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, event: str) -> None:
        """Waits for an event, which may have come."""
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._next())

    def _next(self) -> dict:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._read], [], [], max(0.0, self._deadline - time.monotonic()))
            assert ready, f"the browser said nothing for {_LIMIT} s"
            more = os.read(self._read, 1 << 20)
            assert more, "the browser ended"
            self._left += more
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        """Ends the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)


def look(page: Path, scratch: Path) -> SeenPage:
    """Opens a page from disk.

    Args:
        page: HTML file.
        scratch: folder for the browser's own files.
    """
    browser = _Browser(scratch)
    try:
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            browser.call(f"{domain}.enable")
        browser.call("Page.navigate", url=page.as_uri())
        browser.wait("Page.loadEventFired")
        found = browser.call("Runtime.evaluate", expression=_LOOK, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return SeenPage(**found["result"]["value"], errors=[*filter(None, map(_error, browser.events))])
    finally:
        browser.close()


def _error(event: dict) -> str:
    """The text of an event that is an error."""
    said = event.get("params", {})
    if event.get("method") == "Runtime.exceptionThrown":
        details = said["exceptionDetails"]
        return details.get("exception", {}).get("description", details["text"])
    if event.get("method") == "Log.entryAdded" and said["entry"]["level"] == "error":
        return f"{said['entry']['text']} {said['entry'].get('url', '')}"
    return ""
