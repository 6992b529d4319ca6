"""How much memory there is."""

from __future__ import annotations

from pathlib import Path

import torch

MARGIN = {"cpu": 0.9, "cuda": 0.92}
"""The part of free memory that a plan may fill."""


def room_on(device: torch.device, processes: int = 1) -> float:
    """Bytes that a run may take on a device that it has all but to itself; what this process holds is counted in.

    Args:
        device: a GPU, or the CPU (the machine's memory, or the container's where that is less).
        processes: of this run, on the same machine.

    Returns:
        Infinity where nobody says (only Linux does).
    """
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        return (unused + torch.cuda.memory_reserved(device)) * MARGIN["cuda"]
    return (host_memory_left() + resident()) / processes * MARGIN["cpu"]


def host_memory_left() -> float:
    """Bytes that the machine, or the container, has left; infinity where nobody says."""
    return min(filter(None, [_available(), _left_in_container()]), default=float("inf"))


def resident() -> float:
    """Bytes that this process has in memory; 0 where nobody says."""
    return _number("/proc/self/statm", 1) * 4096


def _available() -> float:
    """Memory that Linux would give without swapping; 0 where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0.0)


def _left_in_container() -> float:
    """What a control group leaves; 0 where there is no limit."""
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most = _number(limit)
        if 0 < most < 2**60:
            return max(1.0, most - _number(usage))
    return 0.0


def _number(path: str, index: int = 0) -> float:
    try:
        return float(Path(path).read_text().split()[index])
    except (OSError, ValueError, IndexError):  # not there, or "max"
        return 0.0
