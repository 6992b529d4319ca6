"""Fetching from a hub: a little one of our own behind HF_ENDPOINT, as a mirror would stand."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SHA = "d" * 40
WHOLE = {
    "README.md": b"# hello",
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "pytorch_model.bin": b"pickle",
    "own.py": b"print('never')",
    "consolidated.safetensors": b"the weights once more",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"x",
}
REPOS = {
    "org/whole": WHOLE,
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "org/gated": "GatedRepo",
    "org/moved": "RevisionNotFound",
}


class _Hub(BaseHTTPRequestHandler):
    """What the hub's client asks of it: a repository's commit, its files, and each file."""

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name, rest = ("/".join(parts[2:4]), parts[4:]) if api else ("/".join(parts[:2]), parts[2:])
        repo = REPOS.get(name, "RepoNotFound")
        if isinstance(repo, str):
            return self._answer(403 if repo == "GatedRepo" else 404, b"no", X_Error_Code=repo, X_Error_Message="no")
        if api and rest[:1] == ["tree"]:
            oid = {file: hashlib.sha1(body).hexdigest() for file, body in repo.items()}
            tree = [{"type": "file", "path": file, "size": len(body), "oid": oid[file]} for file, body in repo.items()]
            return self._answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if api:
            info = {"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in repo]}
            return self._answer(200, json.dumps(info).encode(), Content_Type="application/json")
        body = repo["/".join(rest[2:])]
        return self._answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET


_CHILD = """
import json, sys
from litft.errors import UserError
from litft.models.hub import download
found = {}
for key, (name, options) in json.load(sys.stdin).items():
    try:
        folder = download(name, **options)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        found[key] = [folder.name, files]
    except UserError as error:
        found[key] = str(error)
print(json.dumps(found))
"""


def fetch(endpoint: str, home: Path, **asked: tuple[str, dict]) -> dict:
    """Run `download` in a process of its own, since the hub's client reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(asked),
        env={**environment, **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def mirror() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_j1_only_what_cannot_run_is_fetched_from_the_mirror(mirror: str, tmp_path: Path) -> None:
    texts = ["README.md", "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "config.json"]
    texts += ["tokenizer.json"]
    found = fetch(
        mirror,
        tmp_path,
        texts=("org/whole", {"weights": False}),
        part=("org/whole", {"offline": True}),
        whole=("org/whole", {}),
        again=("org/whole", {"offline": True}),
        code=("org/whole", {"code": True, "revision": SHA}),
    )
    assert found["texts"] == [SHA, texts]
    assert "litft download org/whole" in found["part"]
    assert found["whole"] == found["again"] == [SHA, sorted([*texts, "model.safetensors"])]
    assert found["code"] == [SHA, sorted([*texts, "model.safetensors", "own.py"])]


def test_refusals_say_the_mend(mirror: str, tmp_path: Path) -> None:
    found = fetch(
        mirror,
        tmp_path,
        gated=("org/gated", {}),
        absent=("org/absent", {}),
        moved=("org/moved", {"revision": "v9"}),
        pickled=("org/pickled", {}),
    )
    assert "hf auth login" in found["gated"]
    assert f"{mirror}/org/gated" in found["gated"]
    assert f"no model org/absent on {mirror}" in found["absent"]
    assert "no revision 'v9'" in found["moved"]
    assert "no safetensors weights" in found["pickled"]
    assert all(2 <= len(said.splitlines()) <= 5 for said in found.values())


def test_a_hub_out_of_reach(tmp_path: Path) -> None:
    found = fetch("http://127.0.0.1:9", tmp_path, dead=("org/whole", {}))
    assert "http://127.0.0.1:9 cannot be reached" in found["dead"]
    assert "litft download org/whole" in found["dead"]
