"""Data sets of the hub: the real `datasets` and `huggingface_hub` in a process of their own against a small mirror."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest

from litft.data.files import find_files, read_rows
from litft.data.hub import is_id
from litft.errors import UserError

COMMIT = "a" * 40
CARD = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl\n  - split: test\n    path: test.jsonl\n---\n"  # noqa: E501
CALLS = [{"x": 1}, {"city": "SF", "t": "a"}, {}]
TOOL_ROWS = [
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": a}]}]} for a in CALLS
]
REPOS = {
    "org/name": {
        "README.md": CARD,
        "train.jsonl": b"".join(b'{"text": "%d"}\n' % i for i in range(20)),
        "test.jsonl": b'{"text": "t"}\n',
    },
    "org/tools": {"README.md": b"", "train.jsonl": "\n".join(map(json.dumps, TOOL_ROWS)).encode()},
    "org/broken": {"README.md": b"", "train.jsonl": b'{"text": 1}\n{"text"'},
    "org/ragged": {"README.md": b"", "train.jsonl": b'{"text": "a"}\n{"text": {"b": [1]}}\n' * 3},
}


class Mirror(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if found := re.fullmatch(r"/datasets/(\w+/\w+)/resolve/(\w+)/(.+)", path):
            repo, revision, file = found.groups()
            if repo == "org/gated":
                return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="ask")
            if repo not in REPOS:
                return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="none")
            if revision not in ("main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="none")
            if file not in REPOS[repo]:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="none", X_Repo_Commit=COMMIT)
            body = REPOS[repo][file]
            return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)
        found = re.match(r"/api/datasets/(\w+/\w+)(/tree/)?", path)
        if not found or found[1] not in REPOS:
            return self.answer(404)
        files = REPOS[found[1]]
        info = {"id": found[1], "sha": COMMIT, "tags": [], "siblings": [{"rfilename": name} for name in files]}
        tree = [{"type": "file", "oid": "0", "size": len(body), "path": name} for name, body in files.items()]
        return self.answer(200, json.dumps(tree if found[2] else info).encode(), Content_Type="application/json")

    do_HEAD = do_GET


READ = """
import json, sys
from litft.data.files import read_rows
from litft.errors import UserError
out = {}
for source in sys.argv[1:]:
    try:
        out[source] = [[row.line, row.value] for row in read_rows(source)]
    except UserError as error:
        out[source] = str(error)
print(json.dumps(out))
"""


def read(sources, home, **env):
    env = {**os.environ, "HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*", **env}
    done = subprocess.run([sys.executable, "-c", READ, *sources], env=env, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def answers(home):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sources = ["org/name", "org/name[:2]", f"org/name@{COMMIT}:main:train[-5%:]", "org/name:test", "org/tools:train"]
    sources += [
        "org/name:main",
        "org/name:none:train",
        "org/none",
        "org/gated",
        "org/name@v9",
        "org/ragged",
        "org/broken",
    ]
    try:
        yield read(sources, home, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0")
    finally:
        server.shutdown()


def test_splits_slices_and_revisions(answers):
    assert answers["org/name"] == [[i + 1, {"text": str(i)}] for i in range(20)]
    assert answers["org/name[:2]"] == [[1, {"text": "0"}], [2, {"text": "1"}]]
    assert answers[f"org/name@{COMMIT}:main:train[-5%:]"] == [[1, {"text": "19"}]]
    assert answers["org/name:test"] == [[1, {"text": "t"}]]


def test_rows_of_mixed_types(answers):
    read = answers["org/ragged"]  # as of version 5 the library keeps them apart; before, it refuses them
    assert (
        read == [[i + 1, {"text": ["a", {"b": [1]}][i % 2]}] for i in range(6)] or "do not fit into one table" in read
    )


def test_i2_a_table_of_the_hub_adds_no_arguments(answers):
    rows = [row for _, row in answers["org/tools:train"]]
    assert [row["messages"][0]["tool_calls"][0]["arguments"] for row in rows] == CALLS


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("org/name:main", "no such split; write org/name:SPLIT\nthere are ['train', 'test']"),
        ("org/name:none:train", "name one of its configurations, as in org/name:CONFIG:train\nthere are ['main']"),
        (
            "org/none",
            "no such file or folder, and no data set of this name on the hub (a private one needs `hf auth login`)",
        ),
        (
            "org/gated",
            "this data set is gated\naccept its terms on https://huggingface.co/datasets/org/gated, then log in: ",
        ),
        ("org/name@v9", "no such revision\n"),
        (
            "org/broken",
            "its rows are broken or do not fit into one table\n"
            "download its files (`hf download org/broken --repo-type dataset --local-dir DIR`) and give --data DIR",
        ),
    ],
)
def test_what_the_hub_refuses_has_a_mend(answers, source, said):
    assert answers[source].startswith(f"--data {source}: {said}")
    assert len(answers[source].splitlines()) <= 5


ENCODE = """
import json, sys
from litft import SFT, ChatData, Full
data = ChatData(sys.argv[2], val_fraction=0.0).prepare(SFT(sys.argv[1], Full()), max_epochs=1)
print(json.dumps([data.selection.read(i)[0].tolist() for i in range(len(data.selection))]))
"""


def test_i1_a_branch_that_has_moved_is_encoded_anew(tiny_llama, tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path / "cache" / "tokens"

    def ids(source="org/name[:3]", **env):
        proxy = {"NO_PROXY": "*", "no_proxy": "*", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        env = {**os.environ, **proxy, "HF_HOME": str(tmp_path), "LITFT_CACHE": str(cache.parent), **env}
        command = [sys.executable, "-c", ENCODE, str(tiny_llama), source]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    online = {"HF_HUB_OFFLINE": "0"}
    try:
        first = ids(**online)
        assert ids(HF_HUB_OFFLINE="1") == first and len(list(cache.iterdir())) == 1  # the same rows, from the cache
        monkeypatch.setitem(REPOS, "org/name", REPOS["org/name"] | {"train.jsonl": b'{"text": "moved"}\n' * 5})
        monkeypatch.setattr(sys.modules[__name__], "COMMIT", "b" * 40)
        moved = ids(**online)
        assert moved != first and len(moved) == 3 and len(list(cache.iterdir())) == 2
    finally:
        server.shutdown()


def test_offline_keeps_to_the_cache(answers, home):
    offline = read(["org/name:test", "org/never"], home, HF_HUB_OFFLINE="1")
    assert offline["org/name:test"] == answers["org/name:test"]
    assert "not in the cache, while HF_HUB_OFFLINE=1 forbids to fetch it" in offline["org/never"]


@pytest.mark.parametrize(
    "source",
    ["a/b", "a-1/b.c_d", "a/b@v1", "a/b@refs/pr/1", "a/b:x", "a/b:c:x", "a/b@v:c:x[1:2]", "a/b[10%:]", "a/b:x[:-5]"],
)
def test_ids(source):
    assert is_id(source)


@pytest.mark.parametrize(
    "source",
    [
        "a",
        "a/b/c",
        "./a",
        "/a/b",
        "~/a",
        "a/b:",
        "a/b@",
        "a/b:c:d:e",
        "a/b[",
        "a/b[1]",
        "a/b:x[a:b]",
        "a/b c",
        "a/b\n",
        "a:b/c",
    ],
)
def test_not_ids(source):
    assert not is_id(source)


def test_a_path_of_an_existing_folder_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"did you mean data/train\?\nfor the data set of that name .* data/trian:train$"
    ):
        read_rows("data/trian")
    assert find_files("data/trian:train") == []


def test_one_revision_only():
    with pytest.raises(UserError, match=r"another revision than --data.revision v2; give one of the two"):
        read_rows("org/name@v1", revision="v2")
