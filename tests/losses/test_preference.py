"""Losses on preference rows: TRL's own code on the same numbers, and numbers at which formulas break."""

from __future__ import annotations

import itertools
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import litft
from litft.losses.preference import DIVERGENT, LOSSES, Pairs, Settings, kto, log_odds, odds_ratio, partners

PAIRS, TOKENS = 6, 9
SMOOTHED_BY_TRL = ("robust", "exo_pair", "aot", "aot_unpaired")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def masks() -> Tensor:
    """Which tokens are an answer's, of all chosen ones and then all rejected ones, [2 * pairs, tokens]."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, TOKENS, (2 * PAIRS, 1), generator=generator)
    return torch.arange(TOKENS) < lengths


def numbers(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens, and of whole answers under a reference."""
    generator = torch.Generator().manual_seed(4)
    log_p = -scale * torch.rand(2 * PAIRS, TOKENS, generator=generator) * masks()
    noise = scale * torch.randn(2 * PAIRS, generator=generator)
    return log_p.requires_grad_(), log_p.detach().sum(1) + noise


def trl_dpo(log_p: Tensor, reference: Tensor, **settings: Any) -> Tensor:
    """The loss of TRL's DPOTrainer, its code run on these numbers in the place of a model's."""
    from collections import defaultdict

    from trl import DPOTrainer

    mask = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.long), masks().long()], 1)
    zeros = torch.zeros_like(log_p)
    shown = SimpleNamespace(log_probs=log_p, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    trainer = SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        ld_alpha=None,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        use_weighting=False,
        f_divergence_type=settings.get("divergence", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("alpha", 0.5),
        loss_types=settings["loss_types"],
        loss_weights=settings.get("weights", [1.0] * len(settings["loss_types"])),
        beta=settings.get("beta", 0.1),
        label_smoothing=settings.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = reference.chunk(2)
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return DPOTrainer._compute_loss(trainer, lambda **_: shown, inputs, False)


def ours(log_p: Tensor, reference: Tensor, name: str, settings: Settings, **of_pairs: Any) -> Tensor:
    """The same mean loss by `litft.losses.preference`."""
    tokens = masks().sum(1).float().chunk(2)
    pairs = Pairs(*log_p.sum(1).chunk(2), *reference.chunk(2), *tokens, **of_pairs)
    if name.startswith("aot"):
        ratio, ref_ratio = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
        values = {"ratio": ratio, "ref_ratio": ref_ratio}
        values |= {"chosen": pairs.chosen_ratio, "rejected": pairs.rejected_ratio}
        pairs.sorted_ = partners({key: value.detach() for key, value in values.items()})
    return LOSSES[name](pairs, settings).mean()


def same(one: Tensor, other: Tensor, of: Tensor) -> None:
    """Two losses and their gradients agree, and these are not nothing."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    mine, theirs = (torch.autograd.grad(loss, of, retain_graph=True)[0] for loss in (one, other))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert theirs.abs().max() > 1e-4


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_trls(name: str, beta: float, scale: float) -> None:
    smoothing = [0.0, 0.1] if name in SMOOTHED_BY_TRL else [0.0]
    for eps in smoothing if name != "exo_pair" else [0.001, 0.1]:
        log_p, reference = numbers(scale)
        mine = ours(log_p, reference, name, Settings(beta, eps))
        same(mine, trl_dpo(log_p, reference, loss_types=[name], beta=beta, label_smoothing=eps), log_p)


def test_the_losses_are_all_of_trls() -> None:
    with pytest.raises(ValueError, match="Unknown loss type") as refused:
        trl_dpo(*numbers(), loss_types=["none"])
    theirs = set(re.findall(r"'(\w+)'", str(refused.value).partition("one of")[2]))
    assert theirs == {*LOSSES, "sft"} and len(theirs) == 15


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", DIVERGENT)
def test_divergences_are_trls(name: str, divergence: Any) -> None:
    for alpha in (0.5, 1.0, 1.7):
        eps = 0.01 if name == "exo_pair" else 0.0
        log_p, reference = numbers()
        mine = ours(log_p, reference, name, Settings(0.3, eps), divergence=divergence, alpha=alpha)
        theirs = trl_dpo(
            log_p,
            reference,
            loss_types=[name],
            beta=0.3,
            label_smoothing=eps,
            divergence=divergence,
            alpha=alpha,
        )
        same(mine, theirs, log_p)


def test_a_mix_is_trls() -> None:
    log_p, reference = numbers()
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5]
    mine = sum(w * ours(log_p, reference, n, Settings()) for n, w in zip(names[:2], weights[:2], strict=True))
    chosen = masks().chunk(2)[0]
    mine = mine - weights[2] * (log_p[:PAIRS] * chosen).sum() / chosen.sum()
    same(mine, trl_dpo(log_p, reference, loss_types=names, weights=weights), log_p)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_smoothed_labels_are_conservative_dpo(name: str) -> None:
    """The mean of the loss and of that with the answers swapped (Mitchell 2023), which TRL's sigmoid doesn't have."""
    log_p, reference = numbers()
    straight = ours(log_p, reference, name, Settings(0.3))
    swapped = ours(log_p.roll(PAIRS, 0), reference.roll(PAIRS), name, Settings(0.3))
    if name == "sigmoid_norm":  # lengths are swapped with the answers
        tokens = masks().sum(1).float().roll(PAIRS).chunk(2)
        pairs = Pairs(*log_p.sum(1).roll(PAIRS).chunk(2), *reference.roll(PAIRS).chunk(2), *tokens)
        swapped = LOSSES[name](pairs, Settings(0.3)).mean()
    mine = ours(log_p, reference, name, Settings(0.3, 0.2))
    same(mine, 0.8 * straight + 0.2 * swapped, log_p)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_far_answers_stay_finite(name: str) -> None:
    """Long answers, far from the reference on either side; discopop's exponential has its own bound."""
    far = 60.0 if name == "discopop" else 5000.0
    for sign in (1, -1):
        log_p, _ = numbers()
        reference = (log_p.detach().sum(1).view(2, -1) - sign * far * torch.tensor([[1.0], [-1.0]])).flatten()
        loss = ours(log_p, reference, name, Settings(0.1, 0.01))
        (gradient,) = torch.autograd.grad(loss, log_p)
        assert loss.isfinite() and gradient.isfinite().all()


# ---- what needs no reference


def stub(**settings: Any) -> Any:
    return SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **settings)


def test_the_odds_ratio_is_trls() -> None:
    from trl.experimental.orpo import ORPOTrainer

    generator = torch.Generator().manual_seed(5)
    log_p = (-3 * torch.rand(2, 50, generator=generator) - 1e-3).requires_grad_()
    theirs, *_, ratio, log_odds_chosen = ORPOTrainer.odds_ratio_loss(stub(beta=0.2), *log_p)
    same(0.2 * odds_ratio(*log_p).mean(), theirs.mean(), log_p)
    torch.testing.assert_close(odds_ratio(*log_p).mean(), ratio)
    torch.testing.assert_close((log_odds(log_p[0]) - log_odds(log_p[1])).mean(), log_odds_chosen)


@pytest.mark.parametrize(
    ("name", "eps"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0), ("simpo", 0.0), ("simpo", 0.2)]
)
def test_cpo_and_simpo_are_trls(name: str, eps: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    generator = torch.Generator().manual_seed(6)
    log_p = (-4 * torch.rand(2, 50, generator=generator)).requires_grad_()
    settings = {"beta": 0.4, "label_smoothing": eps, "loss_type": name, "simpo_gamma": 0.3, "alpha": 0.0}
    theirs, *_ = CPOTrainer.cpo_loss(stub(**settings), *log_p)
    options: dict[str, Any] = {"beta": 0.4, "label_smoothing": eps}
    method = litft.SimPO(gamma=0.3, **options) if name == "simpo" else litft.CPO(loss_type=name, **options)
    same(method.losses(*log_p).mean(), theirs.mean(), log_p)


@pytest.mark.parametrize("kl", [-0.5, 0.0, 0.8])
@pytest.mark.parametrize("good", ["both", "all", "none"])
def test_kto_is_trls(good: str, kl: float) -> None:
    from collections import defaultdict

    from trl import KTOTrainer

    log_p, reference = numbers()
    rows = len(log_p)
    label = {"both": torch.arange(rows) % 3 > 0, "all": torch.ones(rows).bool(), "none": torch.zeros(rows).bool()}[good]
    zeros = torch.zeros_like(log_p)
    shown = SimpleNamespace(log_probs=log_p, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    mask = torch.cat([torch.zeros(rows, 1, dtype=torch.long), masks().long()], 1)
    moved = torch.full((rows,), kl)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        model=SimpleNamespace(training=True),
        _compute_kl_logps=lambda *_: moved,
        precompute_ref_logps=True,
        calculate_KL=True,
        aux_loss_enabled=False,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.0,
        undesirable_weight=1.4,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": label}
    batch |= {"ref_logps": reference, "ref_KL_logps": torch.zeros(rows)}
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: shown, batch, False)
    losses = kto(log_p.sum(1) - reference, label, torch.tensor(max(kl, 0.0)), 0.3)
    same((torch.where(label, 1.0, 1.4) * losses).mean(), theirs, log_p)


# ---- log-odds where digits are lost


def log_odds_in_64_bits(x: float) -> float:
    return x - math.log(-math.expm1(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_g6_log_odds_are_finite_at_both_ends(dtype: torch.dtype) -> None:
    for better, worse in itertools.product([0.0, -1e-8, -1e-4, -50.0], repeat=2):
        pair = torch.tensor([[better], [worse]], dtype=dtype, requires_grad=True)
        loss = -odds_ratio(*pair).sum()
        (gradient,) = torch.autograd.grad(loss, pair)
        assert loss.isfinite() and gradient.isfinite().all(), (better, worse)


@pytest.mark.parametrize("x", [-1e-4, -1e-3, -0.1, -0.69, -math.log(2), -0.7, -3.0, -20.0, -50.0])
def test_g6_log_odds_keep_their_digits(x: float) -> None:
    at = torch.tensor(x, requires_grad=True)
    value = log_odds(at)
    exact = log_odds_in_64_bits(float(at))
    assert float(value) == pytest.approx(exact, rel=1e-4, abs=1e-6)
    (slope,) = torch.autograd.grad(value, at)
    assert float(slope) == pytest.approx(-1 / math.expm1(float(at)), rel=1e-4)  # d/dx log(p / (1 - p)) = 1 / (1 - p)


# ---- settings without effect are refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss_type": "sigmod"}, "none of sigmoid,"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 for 2 losses"),
        ({"loss_type": "exo_pair"}, "above 0, such as 0.001"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "hinge has none"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"loss_type": ["sigmoid", "bco_pair"], "f_divergence": "js_divergence"}, "not with bco_pair"),
        ({"beta": 0.0}, "above 0"),
        ({"sync_reference": 2, "reference": "cached"}, "a reference that moves"),
        ({"sync_reference": 2, "sync_share": 0.0}, "above 0, at most 1"),
        ({"offload_reference": True}, "with adapters there is no copy"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(litft.UserError, match=text):
        litft.DPO(**options)


def test_cpos_smoothing_is_the_logistic_losss_only() -> None:
    with pytest.raises(litft.UserError, match="hinge has none"):
        litft.CPO(loss_type="hinge", label_smoothing=0.1)


def test_a_reference_on_the_cpu_is_not_offloaded() -> None:
    with pytest.raises(litft.UserError, match="the run is on the CPU"):
        litft.DPO(tuner=litft.Full(), offload_reference=True).build()


def test_kto_refuses_what_it_cannot() -> None:
    with pytest.raises(litft.UserError, match="not with kto"):
        litft.KTO(reference="cached")
    with pytest.raises(litft.UserError, match="at least 0"):
        litft.KTO(desirable_weight=-1.0)
