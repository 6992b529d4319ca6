from __future__ import annotations

import torch
from tiny import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM

from litft import SFT, Full
from litft.tuners.masters import spread_masters


def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.float()


def test_rounded_weights_and_norms_stay(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    before, model = loaded(folder), loaded(folder)
    model.model.layers[0].mlp.up_proj.weight.data[0, :3] = 0.0
    before.load_state_dict(model.state_dict())
    assert spread_masters(model) > 0
    moved = 0
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old.bfloat16(), new.bfloat16()), name
        moved += int(not torch.equal(old, new))
        assert torch.equal(old, new) == ("norm" in name or "embed" in name), name
    assert moved
    assert (model.model.layers[0].mlp.up_proj.weight[0, :3] == 0).all()


def test_an_update_shows_at_once_in_the_mean():
    weight = nn.Parameter(torch.full((1000, 1000), 0.75))
    layer = nn.Linear(1000, 1000, bias=False)
    layer.weight = weight
    model = nn.ModuleDict({"layer": layer})
    model.get_input_embeddings = lambda: nn.Embedding(2, 2)
    assert float((weight.detach() + 1e-4).bfloat16().float().mean()) == 0.75  # lost
    spread_masters(model)
    with torch.no_grad():
        weight += 1e-4  # a fortieth of a unit in the last place
    assert abs(float(weight.detach().bfloat16().double().mean()) - 0.7501) < 1e-5


def test_every_load_has_the_same_and_16_bit_or_learned_weights_are_left(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    one, two = loaded(folder), loaded(folder)
    spread_masters(one), spread_masters(two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert spread_masters(one) == 0  # they hold more than bf16 numbers now
    assert spread_masters(two.bfloat16()) == 0


def test_only_full_tuning_in_bf16_spreads(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    plain = loaded(folder).model.layers[0].mlp.up_proj.weight
    for precision, same in (("32-true", True), ("bf16-mixed", False)):
        weight = SFT(str(folder), tuner=Full()).build(precision).net.model.model.layers[0].mlp.up_proj.weight
        assert torch.equal(weight, plain) == same


def test_losses_of_the_first_steps_are_those_of_fp32(tmp_path):
    """Small steps on weights that are bf16 numbers: without the spread nothing is learned at first."""
    torch.manual_seed(0)
    teacher = nn.Linear(64, 64, bias=False)
    x = torch.randn(256, 64)
    y = teacher(x).detach()

    def losses(mixed: bool, spread: bool) -> list[float]:
        torch.manual_seed(1)
        layer = nn.Linear(64, 64, bias=False)
        layer.weight.data = layer.weight.data.bfloat16().float()
        model = nn.ModuleDict({"layer": layer})
        model.get_input_embeddings = lambda: nn.Embedding(2, 2)
        if spread:
            spread_masters(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
        found = []
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = ((layer(x).float() - y) ** 2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    fp32, lost, ours = losses(False, False), losses(True, False), losses(True, True)
    learned = fp32[0] - fp32[-1]
    assert lost[0] - lost[-1] < 0.6 * learned
    assert abs((ours[0] - ours[-1]) / learned - 1) < 0.15
