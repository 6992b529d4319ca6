"""A model hub on this machine: the part of its HTTP interface that an upload uses, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "t" * 34


class FakeHub:
    """What it holds, and how it fails where a test asks it to.

    Attributes:
        files: by repository and branch, each file's bytes.
        private: by repository.
        fail: a part of a path, and the status that a request to it is answered with.
        asked: the requests, as "METHOD path".
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.fail: tuple[str, int] | None = None
        self.asked: list[str] = []
        self.messages: list[str] = []
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any, dict[str, str]]:
        if self.fail and self.fail[0] in path:
            return self.fail[1], {"error": "made to fail"}, {}
        if path.startswith("/blob/"):
            assert hashlib.sha256(body).hexdigest() == path[6:]
            self.blobs[path[6:]] = body
            return 200, {}, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}, {}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": []}, {}
        said = json.loads(body) if body and not path.count("/commit/") else {}
        if path == "/api/repos/create":
            owner = said.get("organization") or "me"
            if owner != "me":
                return 403, {"error": "You don't have the rights to create a model under this namespace"}, {}
            repo = f"{owner}/{said['name']}"
            self.private[repo], self.files[repo, "main"] = (
                said.get("visibility") == "private" or bool(said.get("private")),
                {},
            )
            return 200, {"url": f"{self.url}/{repo}"}, {}
        if path == "/api/validate-yaml":
            good = re.match(r"---\n.*?\n---\n", said["content"], re.S)
            return 200, {"errors": [] if good else [{"message": "no front matter"}], "warnings": []}, {}
        found = re.match(r"/(?:api/models/)?([\w-]+/[\w-]+?)(?:\.git)?(/.*)?$", path)
        repo, rest = (found[1], found[2] or "") if found else ("", "")
        if repo not in self.private:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if not rest:
            return 200, {"id": repo, "private": self.private[repo], "siblings": []}, {}
        if rest.startswith("/branch/"):
            self.files.setdefault((repo, rest[8:]), {})
            return 200, {}, {}
        if rest.startswith("/preupload/"):
            mode = {
                file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in said["files"]
            }
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in mode.items()]}, {}
        if rest == "/info/lfs/objects/batch":
            to = [{**one, "actions": {"upload": {"href": f"{self.url}/blob/{one['oid']}"}}} for one in said["objects"]]
            return 200, {"transfer": "basic", "objects": to}, {}
        if rest.startswith("/commit/"):
            branch = self.files[repo, rest[8:]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.messages.append(value["summary"])
                elif line["key"] == "lfsFile":
                    branch[value["path"]] = self.blobs[value["oid"]]
                else:
                    branch[value["path"]] = base64.b64decode(value["content"])
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40}, {}
        return 404, {"error": f"no such place: {path}"}, {}


@contextmanager
def running() -> Iterator[FakeHub]:
    """A hub that listens at its `url`."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            status, content, headers = hub.answer(self.command, path, body, self.headers.get("Authorization", ""))
            text = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(text)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = _serve

        def log_message(self, *args: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
