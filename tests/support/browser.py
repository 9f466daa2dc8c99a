"""Opens a page of a local file in headless Chromium and says what it shows."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

#: Debian's package of this name has it.
BROWSER = "chromium-headless-shell"

#: Runs in the page: whether pictures have pixels, and whether each video can be played and sought.
_LOOK = """
<script>
addEventListener("load", async () => {
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
  const seen = {title: document.title, pictures, charts, videos, height: document.body.scrollHeight};
  const place = document.createElement("pre");
  place.id = "looked"; place.textContent = JSON.stringify(seen); document.body.append(place);
});
</script>
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
        errors: messages of the console, and requests to anything but local files.
    """

    title: str
    pictures: list[float]
    charts: list[float]
    videos: list[dict]
    height: float
    errors: list[str]


def look(page: Path, scratch: Path) -> SeenPage:
    """Opens a page from disk.

    Args:
        page: HTML file.
        scratch: folder for the copy with the script, and for the browser's own files.
    """
    copy = scratch / "looked-at.html"
    copy.write_text(page.read_text().replace("</body>", f"{_LOOK}</body>"))
    command = [
        str(shutil.which(BROWSER)), "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required",
        f"--user-data-dir={scratch / 'browser'}", "--virtual-time-budget=20000", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(scratch)}
    )
    found = re.search(r'<pre id="looked">(.*?)</pre>', ended.stdout, re.DOTALL)
    assert found is not None, f"the page did not load: {ended.stderr[-2000:]}"
    errors = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    return SeenPage(**json.loads(unescape(found[1])), errors=errors)
