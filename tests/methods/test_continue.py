"""`--model ADAPTER`: the adapter is gone on with, in its own shape."""

from __future__ import annotations

import pytest
from tiny import save_tiny

from litft import LoRA, QLoRA, UserError
from litft.models.load import load_model
from litft.models.resolve import resolve


@pytest.fixture
def adapter(tmp_path):
    import torch

    source = resolve(str(save_tiny(tmp_path / "model", "llama")))
    model = load_model(source, dtype=torch.float32)
    tuner = LoRA(r=4, alpha=8, dropout=0.1)
    tuner.apply(model)
    tuner.save(model, tmp_path / "adapter", str(source.folder))
    return tmp_path / "adapter"


def test_its_shape_is_kept_and_training_options_are_the_new_ones(adapter):
    tuner = LoRA(dropout=0.3, lora_plus_ratio=4).continuing(adapter)
    assert (tuner.r, tuner.alpha, tuner.dropout, tuner.lora_plus_ratio) == (4, 8, 0.3, 4)
    assert LoRA().continuing(adapter).dropout == 0.1
    assert QLoRA(quant="int8").continuing(adapter).quant == "int8"


@pytest.mark.parametrize("asked", [{"r": 64}, {"alpha": 7}, {"targets": ["q_proj"]}, {"dora": True}])
def test_another_shape_is_refused_not_ignored(adapter, asked):
    with pytest.raises(UserError, match=f"--model.tuner.{next(iter(asked))}"):
        LoRA(**asked).continuing(adapter)
    LoRA(r=4).continuing(adapter)
