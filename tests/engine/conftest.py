"""What several tests of the engine train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import chat_rows, save_tiny, write_jsonl
from zygote import Zygote


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 chats."""
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_rows(36))


@pytest.fixture(scope="session")
def gpt2_with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    return save_tiny(folder, "gpt2", embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    server = Zygote()
    yield server
    server.close()
