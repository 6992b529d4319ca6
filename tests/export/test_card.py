"""The model card: what the hub reads of it, what people read, and code that does what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from lightning import Trainer
from tiny import chat_rows, save_tiny, write_jsonl

from litft import SFT, ChatData, Full, LoRA
from litft.cli.main import main
from litft.export.card import Base, Training, base_of, model_card
from litft.models.alias import DEFAULT_MODEL, cache_dir
from litft.models.resolve import ModelSource, resolve

BASE_CARD = "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: https://example.org/l\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def finals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved by the Python API after an epoch: an adapter and a whole model; their base lies in a folder of its own."""
    folder = tmp_path_factory.mktemp("private-place")
    base = save_tiny(folder / "tiny-base")
    (base / "README.md").write_text(BASE_CARD)
    rows = write_jsonl(folder / "secret-project.jsonl", chat_rows(40))
    found = {}
    for name, tuner in {"adapter": LoRA(r=4), "model": Full()}.items():
        method = SFT(str(base), tuner=tuner)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_epochs=1, num_sanity_val_steps=-1, **quiet)
        trainer.fit(method, datamodule=ChatData(str(rows)))
        found[name] = method.save(folder / name)
    return found


def code_of(card: str, kind: str) -> str:
    return "\n".join(re.findall(rf"```{kind}\n(.*?)```", card, re.S))


@pytest.mark.parametrize(("kind", "library"), [("adapter", "peft"), ("model", "transformers")])
def test_the_front_matter_is_what_the_hub_expects(finals: dict[str, Path], kind: str, library: str) -> None:
    card = ModelCard.load(finals[kind] / "README.md")
    assert card.data.library_name == library and card.data.pipeline_tag == "text-generation"
    assert {"litft", "sft"} <= set(card.data.tags) and ("lora" in card.data.tags) == (kind == "adapter")
    assert (card.data.license, card.data.license_name) == ("other", "tiny-licence")
    assert card.data.base_model is None  # a folder of this machine is no model of the hub


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_it_tells_the_training_and_nothing_of_this_machine(finals: dict[str, Path], kind: str) -> None:
    text = (finals[kind] / "README.md").read_text()
    for said in (
        "| base | tiny-base |",
        "tiny-licence (https://example.org/l)",
        "36 rows",
        "| steps | 36 (1 epoch)",
        "before, ",
    ):
        assert said in text, said
    assert re.search(r"fingerprint of the data \| `[0-9a-f]{12}`", text)
    assert "private-place" not in text and "secret-project" not in text
    assert ("| r | 4 |" in text) == (kind == "adapter")


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_its_code_runs(finals: dict[str, Path], kind: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finals[kind])
    card = Path("README.md").read_text()
    found: dict[str, Any] = {}
    exec(code_of(card, "python"), found)
    assert found["answer"].shape[0] == 1 and capsys.readouterr().out.strip()
    ours, served = code_of(card, "bash").strip().splitlines()
    assert ours == 'litft generate . --prompt "Hello"' and main(["generate", ".", "--prompt", "Hello"]) == 0
    wanted = "vllm serve tiny-base --enable-lora --max-lora-rank 8 --lora-modules tuned=."
    assert served == (wanted if kind == "adapter" else "vllm serve .")


def test_its_commands_are_those_that_other_verbs_have() -> None:
    done = subprocess.run([sys.executable, "-m", "litft", "merge", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--out" in done.stdout  # the card of an adapter that servers don't take names it


def test_losses_given_by_the_caller_go_before_the_trainers(tiny_folder: Callable[..., Path]) -> None:
    training = Training("SFT", "lora", losses_before={"val_loss": 3.0}, losses_after={"val_loss": 2.5, "val_loss/a": 1})
    text = model_card(tiny_folder("llama"), Base("org/name", "org/name", {"license": "mit"}), training)
    assert "| held-out loss | 3.0000 before, 2.5000 after |" in text and "| held-out loss/a | 1.0000 after |" in text
    assert "[org/name](https://huggingface.co/org/name)" in text
    assert ModelCard(text).data.base_model == "org/name" and ModelCard(text).data.license == "mit"


def test_the_base_is_known_by_what_it_was_fetched_as(tmp_path: Path) -> None:
    default = cache_dir() / "models" / DEFAULT_MODEL
    base = base_of(ModelSource(DEFAULT_MODEL, default))
    assert base.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct" and base.license == {"license": "apache-2.0"}
    assert "4 bits" in base.note
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    save_tiny(snapshot)
    (snapshot / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    base = base_of(resolve(snapshot))
    assert (base.name, base.hub_id, base.license) == ("org/name", "org/name", {"license": "llama3.2"})


def test_a_run_as_the_base_passes_on_what_it_was_made_from(tmp_path: Path) -> None:
    final = save_tiny(tmp_path / "0001-full" / "final")
    (final / "README.md").write_text("---\nlicense: mit\nbase_model: org/name\n---\n")
    base = base_of(ModelSource("x", final))
    assert (base.name, base.hub_id, base.license) == ("0001-full", "org/name", {"license": "mit"})


@pytest.mark.parametrize(
    "front",
    [
        "license: [a, b]",
        "license: |\n  mit\n  ---\n  <script>alert(1)</script>",
        "license: {",
        "base_model: ../x",
        "- a",
    ],
)
def test_a_hostile_card_of_the_base_leads_to_a_good_one(tmp_path: Path, front: str) -> None:
    model = save_tiny(tmp_path / "<b>`x`")
    (model / "README.md").write_text(f"---\n{front}\n---\n")
    text = model_card(model, base_of(ModelSource("x", model)))
    assert "<script" not in text and "<b>" not in text and "bx" in text
    assert ModelCard(text).data.base_model is None


def test_servers_are_not_offered_an_adapter_that_they_refuse(finals: dict[str, Path], tmp_path: Path) -> None:
    for file in finals["adapter"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "adapter_config.json").read_text().replace('"use_dora": false', '"use_dora": true')
    (tmp_path / "adapter_config.json").write_text(config)
    assert "litft merge . --out merged" in code_of(model_card(tmp_path, Base("b")), "bash")


def test_a_merged_model_keeps_what_its_adapter_tells_and_loads_as_a_model(
    finals: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", str(finals["adapter"]), "--out", str(merged)]) == 0
    before, after = (ModelCard.load(folder / "README.md") for folder in (finals["adapter"], merged))
    assert after.data.library_name == "transformers" and after.data.license_name == "tiny-licence"
    for said in ("| r | 4 |", "before, ", "36 rows", "A language model, fine-tuned from `tiny-base`", "## Limits"):
        assert said in after.text, said
    assert code_of(after.text, "bash").splitlines()[1] == "vllm serve ." and "Peft" not in after.text
    assert (
        before.text.partition("## How to load")[0].splitlines()[4:]
        == (after.text.partition("## How to load")[0].splitlines()[4:])
    )
    monkeypatch.chdir(merged)
    exec(code_of(after.text, "python"), {})


def test_a_merged_model_whose_adapter_has_no_card_is_said_to_come_of_it_alone(
    finals: dict[str, Path], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(finals["adapter"], tmp_path / "adapter"))
    (adapter / "README.md").unlink()
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "fine-tuned from `tiny-base`" in card and "another adapter" not in card


def test_what_others_wrote_of_a_model_goes_with_it(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    (base / "README.md").write_text(BASE_CARD)
    assert main(["export", str(base), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "README.md").read_text() == BASE_CARD


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_reward_model_is_loaded_as_one(
    finals: dict[str, Path], tmp_path: Path, tuner: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
    monkeypatch.chdir(tmp_path)
    pairs, base = write_jsonl("pairs.jsonl", rows), finals["adapter"].parent / "tiny-base"
    words = ["--data", str(pairs), "--model", str(base), "--out", "out", "--trainer.max_steps", "2"]
    assert main(["finetune", "reward", *words, "--model.tuner", tuner]) == 0
    monkeypatch.chdir("out/final")
    card = ModelCard.load("README.md")
    assert card.data.pipeline_tag == "text-classification" and "reward" in card.data.tags
    capsys.readouterr()
    exec(code_of(card.text, "python"), {})
    float(capsys.readouterr().out)
    (command,) = code_of(card.text, "bash").strip().splitlines()
    shutil.copy(tmp_path / "pairs.jsonl", "pairs.jsonl")
    assert main(command.split()[1:]) == 0 and Path("scores.jsonl").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "held-out accuracy" in page and "<h3>mean reward</h3>" in page and "pairs.jsonl:1, answer 2" in page
