"""What is written in C++, compiled once on the machine that runs it, and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from litft.models import cpu

FOLDER = Path(__file__).parent


@functools.cache
def compiler() -> str | None:
    """The C++ compiler, as torch.compile would find it; None where there is none."""
    return next(filter(None, map(shutil.which, [os.environ.get("CXX") or "g++", "clang++"])), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled attention; None where it cannot be built, or where this CPU lacks products in bf16.

    Building takes some two seconds, once for a machine and a version of torch.
    """
    loaded = _load("attention") if cpu.fast_bf16() else None
    return loaded if loaded is not None and loaded.litft_attention_runs_here() else None


@functools.cache
def use_arena() -> bool:
    """Take the memory of all further tensors on the CPU from the arena of memory.cpp; False where it can't be."""
    loaded = _load("memory")
    used = loaded is not None and bool(loaded.litft_use_arena())
    if loaded is not None and not used:
        _problems.append("this process may not reserve addresses (ulimit -v, or vm.overcommit_memory 2)")
    return used


def _load(name: str) -> ctypes.CDLL | None:
    """The library made from `name`.cpp; None where it cannot be built."""
    if platform.system() != "Linux":
        return None
    if compiler() is None:
        _problems.append("there is no C++ compiler here (g++ or clang++)")
        return None
    try:
        return ctypes.CDLL(str(_built(name)))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip().splitlines()
        _problems.append(f"{name}.cpp can't be compiled: {(said or ['?'])[0][:160]}")
        return None


_problems: list[str] = []


def problem() -> str:
    """Why something that was wanted until now runs without C++, for the console; empty where nothing does."""
    return next(iter(_problems), "")


def _built(name: str) -> Path:
    from litft.models.alias import cache_dir

    source, torch_root = FOLDER / f"{name}.cpp", Path(torch.__file__).parent
    wide = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    flags = ["-std=c++20", "-O3", "-march=native", *wide, "-fno-math-errno", "-fopenmp", "-fPIC", "-w"]
    # torch's own OpenMP: a second one would bring a second set of threads
    openmp = [str(path) for path in torch_root.glob("lib/libgomp*.so*")] or ["-fopenmp"]
    texts = [path.read_text() for path in (source, *sorted(FOLDER.glob("*.h")))]
    parts = [*texts, torch.__version__, str(compiler()), *sorted(cpu.flags()), *flags]
    place = cache_dir() / "native" / f"{name}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:20]}.so"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:  # beside its place, then renamed
        compiled, linked = f"{folder}/{name}.o", f"{folder}/{name}.so"
        run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=300)
        run([compiler(), *flags, f"-I{torch_root}/include", "-c", str(source), "-o", compiled])
        run([compiler(), "-shared", compiled, "-o", linked, f"-L{torch_root}/lib", "-ltorch_cpu", "-lc10", *openmp])
        os.replace(linked, place)
    return place


class _Matrix(ctypes.Structure):
    """`Matrix` of attention.cpp."""

    _fields_ = (("data", ctypes.c_void_p), ("head", ctypes.c_int64), ("token", ctypes.c_int64))

    @classmethod
    def of(cls, x: Tensor) -> _Matrix:
        return cls(x.data_ptr(), x.stride(1), x.stride(2))


SIZES = ("documents", "tokens", "heads", "kv_heads", "dim", "value_dim", "window")


class _Shape(ctypes.Structure):
    """`Shape` of attention.cpp."""

    _fields_ = (
        ("bounds", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in SIZES),
        ("scale", ctypes.c_float),
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, scale: float, window: int
) -> None:
    """Fill `out` and `lse`.

    Args:
        q: bf16 [1, heads, tokens, dim], as all of these.
        k: of fewer heads, perhaps.
        v: with a dimension of its own.
        out: the attended values.
        lse: log-sum-exp of each query's scores, fp32 [heads, tokens].
        bounds: where documents begin and the last one ends, int32 [documents + 1].
        scale: factor on the scores.
        window: tokens a query sees; 0 for all before it.
    """
    _call("litft_attention", [q, k, v], lse, [out], bounds, scale, window)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    bounds: Tensor,
    scale: float,
    window: int,
) -> None:
    """Fill `dq`, `dk` and `dv` from the gradient of `out`; the other arguments are those of `attention`."""
    _call("litft_attention_backward", [q, k, v, grad, out], lse, [dq, dk, dv], bounds, scale, window)


def _call(
    name: str, inputs: list[Tensor], lse: Tensor, outputs: list[Tensor], bounds: Tensor, scale: float, window: int
) -> None:
    inputs, bounds = list(map(_readable, inputs)), bounds.to(torch.int32)
    q, k, v = inputs[:3]
    sizes = q.shape[2], q.shape[1], k.shape[1], q.shape[3], v.shape[3], window
    shape = _Shape(bounds.data_ptr(), len(bounds) - 1, *sizes, scale)
    matrices = [[ctypes.byref(_Matrix.of(x)) for x in some] for some in (inputs, outputs)]
    getattr(library(), name)(*matrices[0], ctypes.c_void_p(lse.data_ptr()), *matrices[1], ctypes.byref(shape))


def _readable(x: Tensor) -> Tensor:
    """A tensor that the kernels can read: rows without gaps, beginning at a whole word of two numbers."""
    even = x.stride(1) % 2 == x.stride(2) % 2 == x.data_ptr() % 4 == 0
    return x if x.stride(3) == 1 and even else x.contiguous()
