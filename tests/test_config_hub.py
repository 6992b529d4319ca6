"""Every ready-made configuration really trains, on its family's tiny model."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from litft.cli.arguments import config_hub, find_config, hub_names
from litft.cli.main import main
from tests.tiny import chat_rows, save_tiny

FAMILY = {"smollm2": "llama", "qwen3": "qwen3", "llama3": "llama"}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for family in set(FAMILY.values()):
        save_tiny(folder / family, family)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(40, 0)))
    return folder


def test_the_promised_ones_are_there():
    promised = [f"smollm2/135m-{t}" for t in ("full", "lora", "qlora")] + [
        f"qwen3/0.6b-{t}" for t in ("full", "lora", "qlora")
    ]
    assert {*promised, "llama3/8b-lora", "llama3/8b-qlora"} <= set(hub_names())


@pytest.mark.parametrize("name", hub_names())
def test_each_runs_two_steps(name, material, tmp_path):
    tuner = name.rpartition("-")[2]
    model = material / FAMILY[name.partition("/")[0]]
    out = tmp_path / "out"
    words = ["finetune", tuner, "--config", name, "--model", str(model), "--data", str(material / "rows.jsonl")]
    assert (
        main(
            [
                *words,
                "--out",
                str(out),
                "--trainer.max_steps",
                "2",
                "--trainer.accelerator",
                "cpu",
                "--samples.count",
                "0",
            ]
        )
        == 0
    )
    with open(out / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    assert (out / "final" / ("config.json" if tuner == "full" else "adapter_config.json")).exists()


@pytest.mark.parametrize("name", hub_names())
def test_each_states_only_what_differs_from_the_defaults(name):
    from litft import Method

    stated = yaml.safe_load(find_config(name).read_text())["model"]
    assert stated.pop("tuner") == name.rpartition("-")[2]
    import inspect

    defaults = {key: p.default for key, p in inspect.signature(Method).parameters.items()}
    same = [key for key, value in stated.items() if defaults[key] == value and key != "path"]
    assert not same and len((config_hub() / f"{name}.yaml").read_text().splitlines()) < 12
