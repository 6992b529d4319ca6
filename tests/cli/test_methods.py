"""Every option of every method, as flags and from a file, gets to the method; what makes no sense is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from preferences import files, save_model
from tiny import chat_rows, write_jsonl

import litft
from litft.cli.keys import METHODS
from litft.cli.main import main
from litft.errors import UserError
from litft.methods.base import Method

SAID: dict[str, list[dict[str, Any]]] = {
    "lora": [{"neftune": 5.0, "label_smoothing": 0.1}],
    "dpo": [
        *({"loss_type": name} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero")),
        *({"loss_type": name} for name in ("apo_down", "aot", "aot_unpaired", "sigmoid_norm", "sft")),
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "exo_pair", "label_smoothing": 0.001},
        {"loss_type": "discopop", "discopop_tau": 0.1},
        {"loss_type": ["sigmoid"], "beta": 0.2},
        {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5], "sync_reference": 2, "sync_share": 0.5},
        *({"f_divergence": name} for name in ("reverse_kl", "forward_kl", "js_divergence")),
        {"f_divergence": "alpha_divergence", "f_alpha": 0.3, "reference": "cached"},
    ],
    "orpo": [{"beta": 0.2, "nll_on": "all"}],
    "simpo": [{"beta": 2.5, "gamma": 1.5, "nll_weight": 0.5, "nll_on": "all", "label_smoothing": 0.1}],
    "cpo": [*({"loss_type": name} for name in ("sigmoid", "hinge", "ipo")), {"beta": 0.3, "nll_weight": 0.0}],
    "kto": [{"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5, "reference": "live"}],
    "reward": [{"centring": 0.01}],
    "distill": [
        *({"loss_type": name} for name in ("forward_kl", "reverse_kl", "symmetric_kl", "js_divergence")),
        {"share": 0.3, "temperature": 2.0, "ce_share": 0.2, "top_k": 8, "teacher_quant": "int8"},
        {"on_policy": 0.5, "answer_temperature": 0.7, "max_new_tokens": 9, "neftune": 1.0},
    ],
}
ATTRIBUTES = {"loss_type": "kind", "reference": "reference_kind"}


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("common")
    chats = write_jsonl(folder / "chats.jsonl", chat_rows(20))
    return {
        name: str(path) for name, path in ({"chats": chats, "model": save_model(folder / "m")} | files(folder)).items()
    }


def test_every_method_is_here() -> None:
    assert {"lora", *SAID} == METHODS.keys() - {"full", "qlora"}


@pytest.mark.parametrize("way", ["flags", "file"])
@pytest.mark.parametrize("name", SAID)
def test_options_get_to_the_method(
    name: str, way: str, common: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Method] = []

    def stop(method: Method, *args: Any, **options: Any) -> None:
        made.append(method)
        raise UserError("enough")

    monkeypatch.setattr("litft.engine.run.plan", stop)
    kind = getattr(litft, METHODS[name].method.removeprefix("litft."))
    more = {"teacher": common["model"]} if name == "distill" else {}
    for options in SAID[name]:
        said = more | options
        words = ["finetune", name, "--model", common["model"], "--data", common[kind.rows], "--dry_run"]
        if way == "flags":
            for key, value in said.items():
                words += [f"--model.{key}", *map(str, value if isinstance(value, list) else [value])]
        else:
            (tmp_path / "said.yaml").write_text(yaml.safe_dump({"model": said}))
            words += ["--config", str(tmp_path / "said.yaml")]
        made.clear()
        assert main(words) == 2 and len(made) == 1, options
        direct, found = kind(common["model"], litft.LoRA(), **said), made[0]
        assert type(found) is kind
        for attribute in (*kind.loss_settings, *(["reference_kind"] if "reference" in said else [])):
            assert getattr(found, attribute) == getattr(direct, attribute), (options, attribute)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("DPO", {"loss_type": []}, "at least one"),
        ("DPO", {"loss_type": ["ipo", "ipo"]}, "each once"),
        ("DPO", {"loss_weights": [-1.0]}, "at least 0"),
        ("DPO", {"loss_weights": [0.0]}, "at least 0"),
        ("DPO", {"loss_type": "discopop", "discopop_tau": 0.0}, "above 0"),
        ("DPO", {"loss_type": "dpo"}, "none of"),
        ("DPO", {"beta": 0.0}, "above 0"),
        ("ORPO", {"beta": -1.0}, "above 0"),
        ("CPO", {"nll_weight": -1.0}, "at least 0"),
        ("CPO", {"loss_type": "ipo", "label_smoothing": 0.1}, "has none"),
        ("Reward", {"centring": -0.1}, "at least 0"),
        ("Distill", {}, "--model.teacher"),
        ("Distill", {"teacher": "x", "temperature": 0.0}, "above 0"),
    ],
)
def test_what_makes_no_sense_is_said(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        getattr(litft, name)(**options)
    assert len(str(error.value).splitlines()) <= 5
