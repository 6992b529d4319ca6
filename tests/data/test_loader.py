"""Workers of the step loader, under signals to the whole process group."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import signal, subprocess, sys
from multiprocessing import active_children
from torch.utils.data import Dataset
from litft.data.loader import StepLoader

class Numbers(Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return index

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a run notes it and ends its step
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    batches = iter(StepLoader(Numbers(), workers=2))
    seen = [next(batches) for _ in range(4)]  # of both workers
    workers = active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        subprocess.run([sys.executable, "-c", f"import os; os.killpg(0, {int(number)})"])  # not the parent's own
    seen += batches if sys.argv[1] == "to the end" else [next(batches) for _ in range(6)]
    assert seen == list(range(len(seen))), seen
    print(len(seen), len(workers))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
@pytest.mark.parametrize(("how", "seen"), [("to the end", 40), ("part", 10)])
def test_workers_outlive_a_signal_to_the_group_but_not_their_parent(how: str, seen: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{seen} 2\n", "")
