"""What this machine has, which fast paths a run will take on it, and what is broken or missing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import platform
import shutil
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

HUB_S = 4.0
"""Seconds that the hub has to answer in."""
DISK_GB, MEMORY_GB = 1.0, 1.0
"""Free space and memory below which not even the default model can be trained."""
LOW_DISK_GB = 10.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        group: what it belongs to: versions, devices, fast paths, memory and disk, hub, extras.
        name: what was looked at.
        text: what was found.
        state: `problem` where litft can't train, `note` where something is slower or missing, else `ok`.
        mend: what to do about it.
    """

    group: str
    name: str
    text: str
    state: Literal["ok", "note", "problem"] = "ok"
    mend: str = ""


def examine() -> list[Finding]:
    """Look at everything; takes some seconds, most of them for imports. Compiles the C++ kernels where they aren't yet.

    Returns:
        What was found, by group. A check that fails is a finding too.
    """
    asked: list[Finding] = []
    hub = threading.Thread(target=_ask, args=(asked,), daemon=True)  # a name server may keep silent for long
    began = time.monotonic()
    hub.start()
    found: list[Finding] = []
    for group, look in CHECKS:
        try:
            found += [Finding(group, *rest) for rest in look()]
        except Exception as error:  # whatever a broken installation may raise
            text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            found.append(Finding(group, "this check", f"failed: {text}", "problem", "pip install --upgrade litft"))
    hub.join(max(0.0, HUB_S + 1 - (time.monotonic() - began)))
    return [*found, *(asked or [Finding("hub", "the model hub", "does not answer", "note", HUB_MEND)])]


Row = tuple[str, str] | tuple[str, str, Literal["ok", "note", "problem"], str]
HUB_MEND = "models then come from folders, or from the cache; a mirror goes into HF_ENDPOINT"


def _versions() -> Iterator[Row]:
    from packaging.requirements import Requirement

    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    try:
        yield "litft", metadata.version("litft")
        needed = [Requirement(text) for text in metadata.requires("litft") or ()]
    except metadata.PackageNotFoundError:
        yield "litft", "not installed, only on the path", "note", "pip install -e ."
        return
    for one in needed:
        if one.marker and not one.marker.evaluate({"extra": ""}):
            continue
        mend = f"pip install '{one.name}{one.specifier}'"
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield one.name, "is missing", "problem", mend
            continue
        if one.specifier.contains(version, prereleases=True):
            yield one.name, version
        else:
            yield one.name, f"{version}, but litft needs {one.specifier}", "problem", mend


def _imports() -> Iterator[Row]:
    for module in ("torch", "transformers", "lightning", "litft.methods.sft"):
        importlib.import_module(module)
    yield "imports", "all of them"


def _devices() -> Iterator[Row]:
    import torch

    from litft.models import cpu

    fast = sorted(cpu.flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "asimd"})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU", f"{_cpu_name()}; {cores} cores for this process, {torch.get_num_threads()} threads; {' '.join(fast)}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, compute capability {gpu.major}.{gpu.minor}"
        yield f"cuda:{index}", text
    if torch.backends.mps.is_available():
        yield "mps", "Apple's GPU"
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            mend = "install torch for CUDA (pytorch.org/get-started), or a newer driver"
            yield "GPU", f"there is an NVIDIA driver, but torch {torch.__version__} can't use it", "note", mend
        elif not torch.backends.mps.is_available():
            yield "GPU", "none"
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    ones = torch.ones(64, 64, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    right = float((ones @ ones)[0, 0]) == 64.0
    mend = "reinstall torch; on a GPU, look at its driver"
    yield ("a product", f"right on {device}") if right else ("a product", f"wrong on {device}", "problem", mend)


def _fast_paths() -> Iterator[Row]:
    import torch

    from litft.engine.precision import default_precision
    from litft.models import cpu, native

    cuda = torch.cuda.is_available()
    precision = default_precision()
    if precision == "32-true":
        text = "32-true: nothing here multiplies bf16 in hardware"
        yield "precision", text, "note", "runs are slower and take more memory than with AVX512-BF16, AMX or a GPU"
    else:
        yield "precision", precision
    if cuda:
        half = torch.cuda.get_device_capability() >= (8, 0)
        mend = "a GPU from Ampere on; attention is slower and takes more memory here"
        yield ("attention", "torch's flash attention") if half else ("attention", "plain, padded", "note", mend)
    elif native.library() is not None:
        yield "attention", "litft's C++ kernels"
    elif native.problem():
        yield "attention", f"blocks of matrix products: {native.problem()}", "note", "apt install g++, or clang"
    else:
        lacks = "for which torch packs no bf16 (AMX)" if cpu.fast_bf16() else "without bf16"
        yield "attention", f"blocks of matrix products: a CPU {lacks} can't run the C++ kernels"
    if not cuda:
        yield _built("memory", native.compiler() if platform.system() == "Linux" else None)
    yield _compile(cuda, native.compiler())
    yield _bitsandbytes("cuda" if cuda else "cpu")
    yield _float8(cuda)
    yield "liger", _extra("liger_kernel", "liger", "--model.liger true") if cuda else "not used: for GPUs"
    flash = importlib.util.find_spec("flash_attn") is not None
    yield "flash-attn", ("used for" if flash and cuda else "not used, and needed only for") + " soft caps on GPUs"
    dist = torch.distributed
    backends = [name for name in ("nccl", "gloo") if dist.is_available() and getattr(dist, f"is_{name}_available")()]
    if backends:
        yield "FSDP and DDP", f"over {', '.join(backends)}"
    else:
        yield "FSDP and DDP", "torch has no distributed backend", "note", "one process a run; install another torch"


def _built(name: str, compiler: str | None) -> Row:
    if compiler:
        return name, f"an arena that keeps what it has had ({Path(compiler).name})"
    if platform.system() != "Linux":
        return name, "the system's own allocator: the arena is for Linux"
    return (
        name,
        "the system's own allocator: there is no C++ compiler",
        "note",
        "apt install g++; steps are slower without",
    )


def _compile(cuda: bool, compiler: str | None) -> Row:
    headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    if cuda and importlib.util.find_spec("triton") is None:
        return "compile", "not possible: triton is missing", "note", "pip install triton"
    if not compiler:
        return "compile", "not possible: there is no C++ compiler", "note", "apt install g++"
    if not headers:
        return "compile", "not possible: Python's headers are missing", "note", "apt install python3-dev"
    return "compile", "in runs long enough to earn it back"


def _bitsandbytes(device: str) -> Row:
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional

        weight = torch.ones(64, 64, device=device)
        back = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    except Exception as error:  # a library that isn't there, or not for this device
        text = str(error).strip().partition("\n")[0][:120]
        return "bitsandbytes", f"does not work on {device}: {text}", "note", "qlora and 8-bit optimizers need it"
    right = bool(torch.allclose(back.float(), weight, atol=0.1))
    return (
        ("bitsandbytes", f"4 bits on {device}") if right else ("bitsandbytes", "wrong results", "note", "reinstall it")
    )


def _float8(cuda: bool) -> Row:
    import torch

    from litft.models.extras import FLOAT8_CAPABILITY

    if not cuda or torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        return "float8", "not used: no GPU here multiplies it"
    return "float8", _extra("torchao", "torchao", "--model.float8 true")


def _extra(module: str, extra: str, flag: str) -> str:
    """Whether a package that a flag asks for is there."""
    there = importlib.util.find_spec(module) is not None
    return f"with {flag}" if there else f"not installed: pip install 'litft[{extra}]'"


def _memory_and_disk() -> Iterator[Row]:
    from litft.engine.room import host_memory_left
    from litft.models.alias import DEFAULT_MODEL, cache_dir

    left = host_memory_left() / 1e9
    few = left < MEMORY_GB
    text = f"{left:.1f} GB free" if left < float("inf") else "nobody says how much"
    yield ("memory", text, "problem", "close other programs") if few else ("memory", text)
    from huggingface_hub import constants

    places = {
        "cache of litft": cache_dir(),
        "cache of the hub": Path(constants.HF_HUB_CACHE),
        "this folder": Path.cwd(),
    }
    names = {"cache of litft": "LITFT_CACHE", "cache of the hub": "HF_HOME"}
    for name, place in places.items():
        mend = f"point {names[name]} at a larger disk" if name in names else "work in another folder, or use --out"
        yield _disk(name, place, mend)
    there = (cache_dir() / "models" / DEFAULT_MODEL / "config.json").is_file()
    yield "default model", "in the cache" if there else "not fetched yet: 93 MB from the package index, on first use"


def _disk(name: str, place: Path, mend: str) -> Row:
    there = place
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return name, f"{place}: cannot be written: {error.strerror}", "problem", mend
    free = shutil.disk_usage(there).free / 1e9
    text = f"{free:,.0f} GB free ({place})"
    if free < DISK_GB:
        return name, f"only {free:.1f} GB free ({place})", "problem", mend
    return (name, text, "note", mend) if free < LOW_DISK_GB else (name, text)


def _ask(into: list[Finding]) -> None:
    """Add what the hub says; where the package for it is broken, the check of the imports says so."""
    with contextlib.suppress(Exception):
        into += _hub()


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    where, name = constants.ENDPOINT, "the model hub"
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", name, "switched off (HF_HUB_OFFLINE)")
    else:
        try:
            status = get_session().get(f"{where}/api/models?limit=1", timeout=HUB_S).status_code
        except Exception as error:  # whatever a network may do
            yield Finding("hub", name, f"{where} can't be reached ({type(error).__name__})", "note", HUB_MEND)
        else:
            good = status < 400
            yield Finding("hub", name, f"{where} answers {status}", "ok" if good else "note", "" if good else HUB_MEND)
    yield Finding("hub", "log-in", "a token is set" if get_token() else "none; private and gated models need one")


def _extras() -> Iterator[Row]:
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in metadata.requires("litft") or ()]
        names = metadata.metadata("litft").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return
    for extra in names:
        own = [
            one for one in needed if one.marker and "extra" in str(one.marker) and one.marker.evaluate({"extra": extra})
        ]
        missing = [one.name for one in own if one.name != "litft" and not _installed(one.name)]
        text = "installed" if not missing else f"without {', '.join(missing)}: pip install 'litft[{extra}]'"
        yield extra, text


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(named, platform.machine())


CHECKS: tuple[tuple[str, Callable[[], Iterator[Row]]], ...] = (
    ("versions", _versions),
    ("versions", _imports),
    ("devices", _devices),
    ("fast paths", _fast_paths),
    ("memory and disk", _memory_and_disk),
    ("extras", _extras),
)
"""What is looked at, in this order; the hub is asked meanwhile."""
