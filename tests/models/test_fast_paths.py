"""Each fast path, on and off, against plain transformers: the same in fp32, no further from fp64 in bf16."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import _FAMILY, FAMILIES, save_tiny
from torch import Tensor
from torch.nn import functional as F

from litft import SFT, Full, LoRA, QLoRA
from litft.data.batch import Batch, Document, pack_documents
from litft.losses.linear_cross_entropy import linear_cross_entropy
from litft.models.attention import NAME, PLAIN
from litft.tuners.layers import LoRALinear

SWITCHES = list(itertools.product((True, False), repeat=2))
"""fast_attention, fast_loss."""


def documents(count: int = 4, seed: int = 0) -> list[Document]:
    """Documents of uneven length, the beginning of each not trained."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, count)
    return [(rng.integers(3, 384, n).astype(np.int64), np.arange(n) > n // 3) for n in lengths]


DOCUMENTS = documents()
TARGETS = sum(int(trained[1:].sum()) for _, trained in DOCUMENTS)


def batch() -> Batch:
    return pack_documents(DOCUMENTS, float(TARGETS), 64)


def gradients(model: Any) -> dict[str, Tensor]:
    """Of everything that learns, in fp64, by name."""
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}


def plain(model: Any, half: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by transformers alone: one document at a time, all logits, cross-entropy."""
    model.zero_grad()
    total = 0.0
    for ids, trained in DOCUMENTS:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1]
        wanted = torch.from_numpy(trained)[1:]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits[wanted], torch.from_numpy(ids)[1:][wanted], reduction="sum") / TARGETS
        loss.backward()
        total += float(loss)
    return total, gradients(model)


def ours(method: Any, half: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a packed micro-batch by litft."""
    method.net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = method.loss(batch())
    loss.backward()
    return float(loss), gradients(method.net.model)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    assert found.keys() == expected.keys()
    off = sum(float((found[n] - expected[n]).square().sum()) for n in expected)
    return (off / sum(float(g.square().sum()) for g in expected.values())) ** 0.5


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of tiny models; wider heads than usual, so that our kernels take them in bf16."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            wide = {"head_dim": 32} if "head_dim" in _FAMILY[family] else {}
            sizes = {"hidden_size": 128, "intermediate_size": 192} if family != "gpt2" else {"n_embd": 128}
            # at other seeds rounding sends a token of gpt_oss to another expert, on this path or on that
            seed = 1 if family == "gpt_oss" else 0
            options = {"initializer_range": 0.06, "seed": seed, **wide, **sizes}
            made[family] = save_tiny(tmp_path_factory.mktemp(family), family, **options)
        return made[family]

    return folder


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    return model


def exact(model: Any) -> Any:
    """A copy in fp64."""
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no fp64
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning_in_fp32_equals_transformers(family: str, family_folder: Any) -> None:
    folder = family_folder(family)
    loss, expected = plain(transformers_model(folder))
    for attention, fused in SWITCHES:
        method = SFT(str(folder), Full(), fast_attention=attention, fast_loss=fused, balance_experts=0.0).build()
        found, grads = ours(method)
        assert (method.net.head is not None) == fused
        assert method.net.model.config._attn_implementation == (NAME if attention else PLAIN)
        assert found == pytest.approx(loss, rel=1e-6), (attention, fused)
        assert distance(grads, expected) < 1e-5, (attention, fused)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning_in_bf16_is_no_further_from_fp64_than_transformers(family: str, family_folder: Any) -> None:
    folder = family_folder(family)
    model = transformers_model(folder)
    loss, expected = plain(exact(model))
    _, theirs = plain(model, half=True)
    limit = distance(theirs, expected)
    for attention, fused in SWITCHES:
        method = SFT(str(folder), Full(), fast_attention=attention, fast_loss=fused, balance_experts=0.0)
        method.build("bf16-mixed")
        method.net.model.load_state_dict(model.state_dict())  # as transformers has them: not spread
        found, grads = ours(method, half=True)
        assert distance(grads, expected) < 1.05 * limit, (attention, fused)
        assert abs(found - loss) < 5e-3 * loss


def adapted(folder: Path, **options: Any) -> Any:
    """A method whose adapters are no longer zero."""
    method = SFT(str(folder), LoRA(r=4), balance_experts=0.0, **options).build(options.pop("precision", "32-true"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(method.net.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return method


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_in_fp32_is_the_same_on_every_path(family: str, family_folder: Any) -> None:
    folder = family_folder(family)
    off = {"fast_attention": False, "fast_loss": False, "fast_lora": False}
    loss, expected = ours(adapted(folder, **off))
    for switch in off:
        found, grads = ours(adapted(folder, **(off | {switch: True})))
        assert found == pytest.approx(loss, rel=1e-6), switch
        assert distance(grads, expected) < 1e-5, switch
    method = adapted(folder)
    fused = [m.shared is not None for m in method.net.modules() if isinstance(m, LoRALinear)]
    assert all(fused) if family != "gpt2" else not any(fused)  # its Conv1D is not taken
    found, grads = ours(method)
    assert found == pytest.approx(loss, rel=1e-6)
    assert distance(grads, expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "granite"])
def test_merged_weights_give_the_loss_of_the_fast_adapters(family: str, family_folder: Any) -> None:
    method = adapted(family_folder(family))
    before, _ = ours(method)
    method.tuner.merge(method.net.model)
    after, _ = plain(method.net.model.requires_grad_())
    assert before == pytest.approx(after, rel=2e-6)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("qwen3_moe", "gpt_oss")])
def test_lora_in_bf16_is_no_further_from_fp64_than_peft(family: str, family_folder: Any) -> None:
    """The base of a bf16 run is stored in bf16: the fp64 reference has those very weights.

    Of experts, rounding chooses others now and then; the routers' own test is the one of full tuning.
    """
    from peft import LoraConfig, get_peft_model

    folder = family_folder(family)
    limits = {}
    for fast in (False, True):
        method = SFT(str(folder), LoRA(r=4), fast_lora=fast).build("bf16-mixed")
        generator = torch.Generator().manual_seed(1)
        adapters = {n: p for n, p in sorted(method.net.model.named_parameters()) if "lora_" in n}
        with torch.no_grad():
            for parameter in adapters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        _, found = ours(method, half=True)
        reference = SFT(str(folder), LoRA(r=4), fast_lora=False, fast_attention=False, fast_loss=False).build()
        reference.net.double().load_state_dict(method.net.state_dict())
        _, expected = ours(reference)
        limits[fast] = distance(found, expected)
    targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapters})
    options = LoraConfig(r=4, lora_alpha=method.tuner.alpha, target_modules=targets, fan_in_fan_out=family == "gpt2")
    theirs = get_peft_model(transformers_model(folder).bfloat16(), options, autocast_adapter_dtype=True)
    with torch.no_grad():
        named = dict(theirs.named_parameters())
        for name, parameter in adapters.items():
            named[f"base_model.model.{name}.default.weight"].copy_(parameter)
    _, grads = plain(theirs, half=True)
    renamed = {n.removeprefix("base_model.model.").removesuffix(".default.weight"): g for n, g in grads.items()}
    limit = distance(renamed, expected)
    assert limits[True] < 1.05 * limit
    assert limits[False] < 1.05 * limit


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_qlora_is_the_same_on_both_paths(quant: Any, family_folder: Any) -> None:
    pytest.importorskip("bitsandbytes")
    found = []
    for fast in (True, False):
        method = SFT(str(family_folder("llama")), QLoRA(quant=quant, r=4), fast_lora=fast).build()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in sorted(method.net.named_parameters()):
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        found.append(ours(method))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert distance(found[0][1], found[1][1]) < 1e-5


# ---- the loss by itself


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 5.0), (2.0, 30.0)])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_the_loss_equals_the_one_over_all_logits(
    bias: bool, frozen: bool, scale: float, softcap: float, alike: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litft.losses.linear_cross_entropy.BLOCK", 128 * 97)  # several blocks
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=generator).requires_grad_()
    weight = torch.randn(97, 16, generator=generator).requires_grad_(not frozen)
    shift = torch.randn(97, generator=generator).requires_grad_(not frozen) if bias else None
    targets = torch.randint(97, (rows,), generator=generator)
    above = torch.ones(()).expand(rows) if alike else torch.rand(rows, generator=generator)
    logits = scale * F.linear(hidden.double(), weight.double(), None if shift is None else shift.double())
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, targets, reduction="none")
    learn = [x for x in (hidden, weight, shift) if x is not None and x.requires_grad]
    wanted = torch.autograd.grad(expected, learn, above.double())
    found = linear_cross_entropy(hidden, weight, targets, shift, scale=scale, softcap=softcap, ahead=True)
    got = torch.autograd.grad(found, learn, above)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_no_rows_give_gradients_of_zero() -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0


MEMORY = """
import sys, torch
from pathlib import Path
from torch.nn import functional as F
from litft.losses.linear_cross_entropy import linear_cross_entropy
from litft.models import native
native.use_arena()
def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6
rows, vocabulary, width = 8192, 151936, 1024
# made in place: what is freed before the measurement would hide as much of what it measures
hidden = torch.empty(rows, width, dtype=torch.bfloat16).normal_().requires_grad_()
weight = torch.empty(vocabulary, width, dtype=torch.bfloat16).normal_(0, 0.02).requires_grad_(sys.argv[2] == "learns")
targets = torch.randint(vocabulary, (rows,))
F.linear(hidden[:8], weight[:8]).sum().backward()
hidden.grad = weight.grad = None
before = peak()
if sys.argv[1] == "fused":
    loss = linear_cross_entropy(hidden, weight, targets).sum()
else:
    loss = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
loss.backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("head", ["frozen", "learns"])
def test_peak_memory_at_8192_tokens_and_152k_vocabulary(head: str) -> None:
    import subprocess
    import sys

    grown = {}
    for kind in ("fused", "plain"):
        done = subprocess.run([sys.executable, "-c", MEMORY, kind, head], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown[kind] = float(done.stdout)
    print(head, grown, grown["fused"] / grown["plain"])
    assert 0.4 < grown["fused"] < (0.1 if head == "frozen" else 0.15) * grown["plain"]


def test_no_tensor_of_the_loss_is_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    block = 256 * 1000
    monkeypatch.setattr("litft.losses.linear_cross_entropy.BLOCK", block)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            sizes.extend(x.untyped_storage().nbytes() // 4 for x in [found] if isinstance(x, Tensor))
            return found

    hidden = torch.randn(4096, 16, requires_grad=True)
    weight = torch.randn(1000, 16)
    with Watch():
        linear_cross_entropy(hidden, weight, torch.randint(1000, (4096,))).sum().backward()
    assert max(sizes) <= block < 4096 * 1000
