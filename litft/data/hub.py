"""Data sets of the Hugging Face hub as a source of rows: `org/name@revision:config:split[a:b]`.

All but `org/name` may be left out: the revision is the default branch, the configuration the only one, the split
`train`, the slice everything. A single name after a colon is a split. Slices are those of the datasets library: row
numbers or percentages, negative ones from the end (`[:100]`, `[10%:20%]`, `[-5%:]`).

The library downloads into its cache and maps the rows from there. `HF_ENDPOINT` names a mirror, `HF_TOKEN` a login,
`HF_HUB_OFFLINE=1` keeps to the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from litft.data.jsontext import snippet
from litft.errors import UserError

if TYPE_CHECKING:
    import datasets

    from litft.data.files import Row

_NAME = r"[A-Za-z0-9][\w.-]*"
_BOUND = r"-?\d+%?"
_ID = re.compile(
    rf"(?P<id>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>[\w./-]+))?"
    rf"(?::(?P<config>[\w.-]+)(?=:))?(?::(?P<split>{_NAME}))?"
    rf"(?P<slice>\[(?:{_BOUND})?:(?:{_BOUND})?\])?"
)


def is_id(source: str) -> bool:
    """Whether a source has the form of a data set id; asks nobody whether there is one."""
    return _ID.fullmatch(source) is not None


def read_hub(source: str, *, revision: str | None = None) -> Iterator[Row]:
    """Read the rows of a data set.

    Args:
        source: the id, as the module says.
        revision: branch, tag or commit, where the id names none.

    Raises:
        UserError: at once: not the form of an id, two revisions, no such data set, split or configuration, a gated
            one, no connection.
    """
    return _rows(_load(source, revision), source)


def content(source: str, *, revision: str | None = None) -> str:
    """What identifies the rows that `read_hub` would read now: another commit of the branch gives another text.

    Taken from what the library has loaded, so it holds offline too: the files in its cache lie under their commit.

    Raises:
        UserError: as `read_hub`.
    """
    table = _load(source, revision)
    files = ["/".join(Path(file["filename"]).parts[-5:]) for file in table.cache_files]
    if not files:  # kept in memory, as the library's settings may say
        digest = hashlib.sha256()
        for row in table:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        files = [digest.hexdigest()]
    return " ".join([source, *files])


def _load(source: str, revision: str | None) -> datasets.Dataset:
    match = _ID.fullmatch(source)
    if not match:
        raise UserError(f"--data {source}: not a data set id; write org/name@revision:config:split[a:b]")
    if revision and match["revision"] and revision != match["revision"]:
        raise UserError(f"--data {source}: another revision than --data.revision {revision}; give one of the two")
    split = (match["split"] or "train") + (match["slice"] or "")
    import datasets

    try:
        # Streaming would be lighter on the disk, but takes no slices and asks the network again in every epoch.
        return datasets.load_dataset(
            match["id"], name=match["config"], split=split, revision=match["revision"] or revision
        )
    except Exception as exc:  # of half a dozen libraries: a message of theirs is all there is to tell them by
        raise UserError(f"--data {source}: {_explain(exc, match['id'])}") from exc


def _rows(table: Iterable[dict[str, Any]], source: str) -> Iterator[Row]:
    from litft.data.files import Row, without_filled_nulls

    try:
        for number, value in enumerate(table, start=1):
            yield Row(source, number, without_filled_nulls(value))
    except Exception as exc:  # a column that wants a package to be decoded, a damaged cache
        raise UserError(f"--data {source}: cannot be read: {snippet(str(exc))}") from exc


def _explain(exc: Exception, name: str) -> str:
    """What went wrong at the hub and how to mend it."""
    text, *more = (
        f"{type(e).__name__}: {' '.join(str(e).split())}".replace(name, "it")
        for e in (exc, exc.__cause__, exc.__context__)
        if e
    )
    cause = " ".join([text, *more])
    if "GatedRepo" in cause or "gated dataset" in cause:
        return (
            "this data set is gated\n"
            f"accept its terms on https://huggingface.co/datasets/{name}, then log in: `hf auth login`, or set HF_TOKEN"
        )
    if "OfflineMode" in cause:
        return (
            "no such file or folder; and not in the cache, while HF_HUB_OFFLINE=1 forbids to fetch it: unset that once"
        )
    if isinstance(exc, ConnectionError) or "Connect" in cause or "Timeout" in cause:
        where = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
        mend = "HF_ENDPOINT may name a mirror, HF_HUB_OFFLINE=1 keeps to the cache"
        return f"no such file or folder; and {where} cannot be reached\n{mend}"
    if "Revision" in text and "exist" in text:
        return f"no such revision\n{snippet(text)}"
    if "NotFound" in text or "doesn't exist" in text:
        return "no such file or folder, and no data set of this name on the hub (a private one needs `hf auth login`)"
    if "Config name is missing" in text or "BuilderConfig" in text:
        return f"name one of its configurations, as in {name}:CONFIG:train\n{_listed(text)}"
    if "Unknown split" in text:
        return f"no such split; write {name}:SPLIT\n{_listed(text)}"
    if "Generation" in text or "Cast" in text:
        return (
            "its rows are broken or do not fit into one table\n"
            f"download its files (`hf download {name} --repo-type dataset --local-dir DIR`) and give --data DIR"
        )
    return f"cannot be loaded: {snippet(text)}"


def _listed(text: str) -> str:
    """The list of names in a message of the datasets library."""
    found = re.search(r"\[[^\]]*\]", text)
    return snippet(f"there are {found[0]}") if found else snippet(text)
