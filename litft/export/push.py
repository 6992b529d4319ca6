"""Upload a model or adapter folder to the model hub, after a look at what would become public."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litft.engine.secrets import hide, issued
from litft.errors import Failed, UserError
from litft.export.card import CARD, Base, front_matter, gives_scores, is_repo_id, model_card, on_hub
from litft.models.alias import DEFAULT_MODEL, HUB_ID
from litft.models.resolve import cached_id, enter, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
TEXTS = (".json", ".md", ".txt", ".jinja", ".yaml", ".yml", ".py", "Modelfile")
PROSE = (".md", ".py", ".jinja")
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
"""These and prose may hold any word, such as api_key="EMPTY": only what has the form of a token counts there."""
ADAPTER = "adapter_config.json"
REFUSED = {
    401: ("the hub doesn't know this token", "log in: hf auth login, or set HF_TOKEN"),
    403: ("this token may not write there", "a token with the right to write, and an owner whom it may write for"),
    404: ("there is no such owner or repository, or this token may not see it", "check --repo OWNER/NAME"),
}
"""What the hub's answers mean, and the mend."""


@dataclass
class Upload:
    """What a push would put on the hub.

    Attributes:
        folder: the model or adapter.
        files: paths within it.
        rewritten: files that go up with another text than here.
        notes: what is changed, for the user.
    """

    folder: Path
    files: list[Path]
    rewritten: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        texts = {name: len(text.encode()) for name, text in self.rewritten.items()}
        return sum(texts.get(file.as_posix()) or (self.folder / file).stat().st_size for file in self.files)


def prepare(name: str | Path, repo: str, base: str | None = None) -> Upload:
    """Look through a folder, and make what goes up independent of this machine.

    Args:
        name: a run folder (its `final/`), an adapter or a model folder.
        repo: where it goes, "owner/name".
        base: the hub's id of the model that an adapter belongs to, where the adapter names a folder.

    Raises:
        UserError: no model there; or it holds pickles, tokens, links out of the folder, or paths of this machine that
            nobody can say another name for.
    """
    folder = enter(Path(name).expanduser())
    if not ((folder / ADAPTER).is_file() or (folder / "config.json").is_file()):
        what = "holds no model: neither config.json nor adapter_config.json" if folder.is_dir() else "is no folder"
        raise UserError(f"{name} {what}\nmend: name a run, an adapter or a model folder")
    upload = Upload(folder, _files(folder))
    _check_files(upload)
    if (folder / ADAPTER).is_file():
        _name_base(upload, base)
    elif base is not None:
        raise UserError(f"--base {base}: {folder} is a whole model, which needs no base\nmend: leave it out")
    _take_card(upload, repo)
    _check_texts(upload)
    return upload


def push(upload: Upload, repo: str, *, private: bool | None = None, revision: str | None = None, message: str) -> str:
    """Make the repository where it isn't there, and commit the files to it, all in one commit.

    The token is huggingface_hub's own business: `HF_TOKEN`, or what `hf auth login` has kept.

    Args:
        upload: of `prepare`.
        repo: "owner/name"; of `full_name`.
        private: whether a new repository is; private where None. One that is there has to be as this says.
        revision: the branch to commit to, made where it isn't there; the main one where None.
        message: of the commit.

    Returns:
        The address of the result.

    Raises:
        UserError: no log-in, no right to write there, or a public repository where a private one was asked for.
        Failed: the hub can't be reached, or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with _explained(f"push to {repo}"):
        try:
            there = api.repo_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private is not False)
        else:
            if private is not None and bool(there.private) != private:
                have, want = ("public", "private") if private else ("private", "public")
                raise UserError(
                    f"--private {str(private).lower()}: {repo} is there, and {have}\n"
                    f"mend: leave --private out to push to it as it is, make it {want} in its settings, or name another"
                )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = []
        for file in upload.files:
            text = upload.rewritten.get(file.as_posix())
            operations.append(CommitOperationAdd(file.as_posix(), text.encode() if text else upload.folder / file))
        api.create_commit(repo, operations, commit_message=message, revision=revision)
    return f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def check_name(repo: str) -> None:
    """Refuse what no repository can be called.

    Raises:
        UserError: saying how one is called.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(f"--repo {repo}: is no name of a repository\nmend: --repo NAME, or --repo OWNER/NAME") from None


def full_name(repo: str) -> str:
    """The repository's name with its owner, who is the user where none is named; asks the hub who that is.

    Raises:
        UserError: it is no name, or nobody is logged in.
        Failed: the hub can't be reached.
    """
    from huggingface_hub import HfApi

    check_name(repo)
    with _explained("push"):
        user = HfApi().whoami()["name"]
    return repo if "/" in repo else f"{user}/{repo}"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a few lines."""
    from huggingface_hub import constants, errors

    where, login = f"{what} ({constants.ENDPOINT})", "log in: hf auth login, or set HF_TOKEN"
    try:
        yield
    except (UserError, Failed):
        raise
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"{where}: the hub is switched off\nmend: unset HF_HUB_OFFLINE") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"{where}: nobody is logged in\nmend: {login}") from error
    except Exception as error:  # whatever else HTTP, a proxy or a disk may raise
        inner = error  # of an upload that failed, the answer that it failed on
        while getattr(inner, "response", None) is None and isinstance(inner.__cause__, Exception):
            inner = inner.__cause__
        status = getattr(getattr(inner, "response", None), "status_code", None)
        if status in REFUSED:
            why, mend = REFUSED[status]
            raise UserError(f"{where}: {why} ({status})\nmend: {mend}") from error
        said = hide((str(inner).strip() or type(inner).__name__).splitlines()[0][:200])
        if status is not None:
            raise Failed(f"{where}: the hub failed ({status}): {said}\nmend: try again later") from error
        raise Failed(
            f"{where}: can't be reached, or broke off: {said}\nmend: check the network, or HF_ENDPOINT"
        ) from error


def _files(folder: Path) -> list[Path]:
    """What belongs to a model: all its files but hidden ones.

    Raises:
        UserError: one of them leads elsewhere.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        file = path.relative_to(folder)
        if any(part.startswith(".") or part == "__pycache__" for part in file.parts):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{path}: is a link out of the folder, and would be uploaded with what it leads to\nmend: remove it"
            )
        if path.is_file():
            found.append(file)
    return found


def _check_files(upload: Upload) -> None:
    if pickled := [file for file in upload.files if file.suffix in PICKLES]:
        raise UserError(
            f"{upload.folder / pickled[0]}: is a pickle, which can run code on whoever loads it; it is not uploaded\n"
            "mend: remove it from the folder (weights belong into .safetensors)"
        )
    if not any(file.suffix in (".safetensors", ".gguf") for file in upload.files):
        raise UserError(f"{upload.folder}: has no weights (.safetensors)\nmend: name the folder that has them")


def _name_base(upload: Upload, base: str | None) -> None:
    """Let the adapter that goes up name its base by the hub's id.

    Raises:
        UserError: it names a folder, and nobody says what that is on the hub.
    """
    config = read_json(upload.folder / ADAPTER)
    named = str(config.get("base_model_name_or_path") or "")
    if base is not None and not is_repo_id(base):
        raise UserError(f"--base {base}: is no id of a model on the hub\nmend: --base OWNER/NAME")
    cached = cached_id(named)
    known = base or (cached[0] if cached else None) or (HUB_ID if Path(named).name == DEFAULT_MODEL else None)
    if known is None and is_repo_id(named) and not Path(named).exists():
        return
    if known is None:
        merge = f"; or upload a whole model:\nlitft merge {upload.folder} --out merged && litft push merged --repo NAME"
        raise UserError(
            f"{upload.folder / ADAPTER}: names {named or 'no base'}, a folder that nobody else has\n"
            f"mend: --base OWNER/NAME, its id on the hub{'' if gives_scores(upload.folder) else merge}"
        )
    if known != named:
        config["base_model_name_or_path"] = known
        if cached and not base:
            config["revision"] = cached[1]
        upload.rewritten[ADAPTER] = json.dumps(config, indent=2, sort_keys=True) + "\n"
        upload.notes.append(f"{ADAPTER} names {known} as the base" + ("" if base else f" (here: {Path(named).name})"))


def _take_card(upload: Upload, repo: str) -> None:
    """The card as it is on the hub, its code naming the repository and its metadata the base.

    Raises:
        UserError: there is one that the hub can't read.
    """
    file = upload.folder / CARD
    base = json.loads(upload.rewritten.get(ADAPTER, "{}")).get("base_model_name_or_path")
    if not file.is_file():
        upload.notes.append(f"a card ({CARD}) is written: there was none")
        upload.files.append(Path(CARD))
        base = base or _named_base(upload.folder)
        text = model_card(upload.folder, Base(base, base) if base else None, title=repo.rpartition("/")[2])
    elif front_matter(file):
        text = file.read_text(encoding="utf-8")
    else:
        raise UserError(
            f"{file}: lacks the front matter (between two lines ---) that says what the model was made from\n"
            "mend: add it; or remove the file, and a card is written"
        )
    upload.rewritten[CARD] = on_hub(text, repo, base)


def _named_base(folder: Path) -> str | None:
    """The base that an adapter names; None for a whole model."""
    return read_json(folder / ADAPTER).get("base_model_name_or_path") if (folder / ADAPTER).is_file() else None


def _check_texts(upload: Upload) -> None:
    """Refuse what has the form of a secret, or names a folder of this machine.

    Raises:
        UserError: with the file, and the line or key.
    """
    homes = [f"{folder}/" for folder in (Path.home(), upload.folder.resolve()) if folder != Path("/")]
    for file in upload.files:
        path = upload.folder / file
        if file.as_posix() not in upload.rewritten and not _is_text(path):
            continue
        text = upload.rewritten.get(file.as_posix()) or path.read_text(encoding="utf-8", errors="replace")
        ours = file.suffix in TEXTS or file.name in TEXTS
        free = not ours or file.suffix in PROSE or file.name in VOCABULARIES
        holds = issued if free else _holds_secret
        if holds(text):
            line = next((number for number, one in enumerate(text.splitlines(), 1) if holds(one)), 1)
            raise UserError(
                f"{path}:{line}: holds what looks like a token or a password; nothing is uploaded\n"
                "mend: take it out; if it was ever public, revoke it"
            )
        if file.name not in VOCABULARIES and (home := next((home for home in homes if home in text), None)):
            line = text.count("\n", 0, text.index(home)) + 1
            raise UserError(
                f"{path}:{line}: names a path of this machine ({home}...)\n"
                "mend: take it out, or name it as others know it"
            )
        if file.suffix == ".json" and not free and (key := _path_in(_parsed(path, text))):
            raise UserError(
                f"{path}: {key} is a path of this machine\nmend: take that key out, or set it to a name of the hub"
            )


def _is_text(file: Path) -> bool:
    """Whether a file is no binary one, as Git tells: its beginning has no zero byte."""
    with file.open("rb") as stream:
        return b"\0" not in stream.read(8192)


def _holds_secret(text: str) -> bool:
    return issued(text) or hide(text) != text


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}\nmend: export the model again, or remove the file") from error


def _path_in(value: Any, key: str = "") -> str | None:
    """The key under which a JSON value holds an absolute path."""
    if isinstance(value, dict):
        return next((found for name, item in value.items() if (found := _path_in(item, str(name)))), None)
    if isinstance(value, list):
        return next((found for item in value if (found := _path_in(item, key))), None)
    is_path = isinstance(value, str) and re.match(r"(/|~/|[A-Za-z]:\\)[^\s/\\]+[/\\]", value) is not None
    return key if is_path and "\n" not in value and len(value) < 1000 else None


__all__ = ["Upload", "check_name", "full_name", "prepare", "push"]
