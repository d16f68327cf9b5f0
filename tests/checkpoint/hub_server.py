"""A Hugging Face Hub of one repository on loopback: what huggingface_hub asks of the real one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "4ea8a1c0" * 5


class Hub(ThreadingHTTPServer):
    """Serves a folder as one repository.

    Attributes:
        downloads: (file, bytes sent) of every answer that carried a file's content.
        loses: hang up on requests whose path ends so; None where all are answered.
    """

    daemon_threads = True

    def __init__(self, repo_id: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo_id = repo_id
        self.folder = folder
        self.downloads: list[tuple[str, int]] = []
        self.loses: str | None = None

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, file_name: str) -> int:
        """Bytes of a file that were sent."""
        return sum(size for name, size in self.downloads if name == file_name)


@contextlib.contextmanager
def serve_hub(repo_id: str, folder: Path) -> Iterator[Hub]:
    """Serve a folder while the context is open."""
    with Hub(repo_id, folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(body)["paths"] if is_json else urllib.parse.parse_qs(body)["paths"]
        names = [asked] if isinstance(asked, str) else asked
        self._send_json([self._entry(n) for n in names if (self.server.folder / n).is_file()])

    def _entry(self, name: str) -> dict[str, Any]:
        data = (self.server.folder / name).read_bytes()
        return {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }

    def _answer(self, with_body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if self.server.loses is not None and path.endswith(self.server.loses):
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        repo = self.server.repo_id
        if path.startswith(f"/api/models/{repo}/tree/"):
            self._send_json([self._entry(p.name) for p in self.server.folder.iterdir()])
        elif path == f"/api/models/{repo}" or path.startswith(f"/api/models/{repo}/revision/"):
            revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
            if revision in ("main", COMMIT):
                names = sorted(p.name for p in self.server.folder.iterdir())
                siblings = [{"rfilename": name} for name in names]
                self._send_json({"id": repo, "sha": COMMIT, "siblings": siblings})
            else:
                self._refuse("RevisionNotFound")
        elif path.startswith(f"/{repo}/resolve/"):
            self._send_file(path.rpartition("/")[2], with_body)
        else:
            self._refuse("RepoNotFound")

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_file(self, name: str, with_body: bool) -> None:
        path = self.server.folder / name
        if not path.is_file():
            self._refuse("EntryNotFound")
            return
        data = path.read_bytes()
        etag = hashlib.sha1(data).hexdigest()
        range_header = self.headers.get("Range")
        if range_header:
            first, _, last = range_header.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if range_header else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.server.downloads.append((name, len(data)))
            self.wfile.write(data)
