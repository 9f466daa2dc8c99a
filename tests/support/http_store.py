"""A web server for a folder that answers range requests, counts requests, and fails on demand."""

import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WebStore:
    """Serves `folder` at `url`; a context manager.

    `fail("shard.tar", 2)` lets the next two requests for a file of that name fail with status 503; `times=None` all
    of them. `asked` counts requests per file name, `sent` is the number of bytes of all bodies.
    """

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.folder = folder
        self.ranges = ranges
        self.asked: Counter[str] = Counter()
        self.sent = 0
        self._failing: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, name: str, times: int | None = None, status: int = 503) -> None:
        self._failing[name] = (float("inf") if times is None else times, status)

    def mend(self) -> None:
        self._failing.clear()

    def __enter__(self) -> "WebStore":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                path = store.folder / self.path.partition("?")[0].lstrip("/")
                with store._lock:
                    store.asked[path.name] += 1
                    left, status = store._failing.get(path.name, (0, 0))
                    store._failing[path.name] = (left - 1, status)
                if left > 0:
                    return self._send(status, b"", {})
                if not path.is_file():
                    return self._send(404, b"", {})
                content = path.read_bytes()
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if asked and store.ranges:
                    first, last = int(asked[1]), int(asked[2] or len(content) - 1)
                    part = content[first : last + 1]
                    where = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
                    return self._send(206 if part else 416, part if body else b"", {"Content-Range": where}, len(part))
                self._send(200, content if body else b"", {"Accept-Ranges": "bytes"}, len(content))

            def _send(self, status: int, body: bytes, headers: dict[str, str], length: int = 0) -> None:
                with store._lock:
                    store.sent += len(body)
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        return Handler
