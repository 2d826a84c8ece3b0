"""As much of the Hugging Face hub as bundles need, on loopback: repositories in memory, one revision each."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_the_test"


@dataclass
class FakeHub:
    """What was uploaded, by repository and file, and which of them are private."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)

    def revision(self, repository: str) -> str:
        """The only commit."""
        return hashlib.sha1(repr(sorted(self.files[repository].items())).encode()).hexdigest()


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that runs meanwhile."""
    hub = FakeHub()

    class Handler(_Handler):
        store = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: FakeHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.store.files.setdefault(name, {})
            self.store.private[name] = asked.get("visibility") == "private"
            return self._json({"url": f"{self.store.url}/{name}", "name": name})
        repository, action = "/".join(self.path.split("/")[3:5]), self.path.split("/")[5]
        if action == "preupload":
            named = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._json({"files": [{**f, "shouldIgnore": False} for f in named]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.store.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = self.store.revision(repository)
        self._json({"commitUrl": f"{self.store.url}/{repository}/commit/{commit}", "commitOid": commit})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            repository, action, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
        else:
            repository, action, revision = "/".join(parts[:2]), parts[2], parts[3]
        if repository not in self.store.files:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        commit, files = self.store.revision(repository), self.store.files[repository]
        if revision not in ("main", commit):
            return self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if action == "tree":
            sizes = {name: len(content) for name, content in files.items()}
            return self._json([{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()])
        if action == "resolve":
            content = files["/".join(parts[4:])]
            etag = hashlib.sha1(content).hexdigest()
            return self._send(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        siblings = [{"rfilename": name} for name in files]
        self._json({"id": repository, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    do_HEAD = do_GET

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""
