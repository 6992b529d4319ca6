"""Every ready-made configuration really trains, on its family's tiny model."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

import litft
from litft.cli.arguments import config_hub, find_config, hub_names
from litft.cli.main import main
from tests.tiny import chat_rows, save_tiny

FAMILY = {"smollm2": "llama", "qwen3": "qwen3", "llama3": "llama"}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for family in set(FAMILY.values()):
        save_tiny(folder / family, family)
    chats = chat_rows(40, 0)
    refusal = {"role": "assistant", "content": "I would rather not say."}
    pairs = [{"prompt": row["messages"][:-1], "chosen": row["messages"][-1], "rejected": [refusal]} for row in chats]
    labelled = [row | {"label": index % 3 > 0} for index, row in enumerate(chats)]
    for kind, rows in {"chats": chats, "pairs": pairs, "labelled": labelled}.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def method_of(name):
    """The word after `litft finetune`, and the kind of rows that it takes."""
    from litft.cli.keys import METHODS

    method = name.rpartition("-")[2]
    return method, getattr(litft, METHODS[method].method.removeprefix("litft.")).rows


def test_the_promised_ones_are_there():
    promised = [f"smollm2/135m-{t}" for t in ("full", "lora", "qlora")] + [
        f"qwen3/0.6b-{t}" for t in ("full", "lora", "qlora")
    ]
    assert {*promised, "llama3/8b-lora", "llama3/8b-qlora"} <= set(hub_names())


@pytest.mark.parametrize("name", hub_names())
def test_each_runs_two_steps(name, material, tmp_path):
    method, rows = method_of(name)
    model = material / FAMILY[name.partition("/")[0]]
    out = tmp_path / "out"
    words = ["finetune", method, "--config", name, "--model", str(model), "--data", str(material / f"{rows}.jsonl")]
    if method == "distill":
        words += ["--model.teacher", str(model)]
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
    tuner = yaml.safe_load(find_config(name).read_text())["model"]["tuner"]
    assert (out / "final" / ("config.json" if tuner == "full" else "adapter_config.json")).exists()


@pytest.mark.parametrize("name", hub_names())
def test_each_states_only_what_differs_from_the_defaults(name):
    import inspect

    from litft.cli.keys import METHODS, TUNERS

    stated = yaml.safe_load(find_config(name).read_text())["model"]
    method = name.rpartition("-")[2]
    assert stated.pop("tuner") == method if method in TUNERS else stated.pop("tuner") in TUNERS
    owners = getattr(litft, METHODS[method].method.removeprefix("litft.")).__mro__
    own = [inspect.signature(owner.__init__).parameters for owner in owners if "__init__" in vars(owner)]
    defaults = {key: p.default for parameters in reversed(own) for key, p in parameters.items()}
    same = [key for key, value in stated.items() if defaults[key] == value and key != "path"]
    assert not same and len((config_hub() / f"{name}.yaml").read_text().splitlines()) < 12
