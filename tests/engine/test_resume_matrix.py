"""Every tuner, interrupted in every way, with and without packing and workers: bitwise the straight run.

All of it with dropout in the model and the adapters, several micro-batches a step, and validation.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from resume_in_two import STEPS
from runs import Trace, assert_same_run, last, start

TUNERS: dict[str, dict[str, Any]] = {
    "lora": {"tuner": "lora"},
    "qlora": {"tuner": "qlora"},
    "full": {"tuner": "full"},
    "full, 8-bit moments": {"tuner": "full", "optimizer": "adamw_8bit"},
}
WAYS: dict[str, list[tuple[int, str]]] = {
    "between steps": [(3, "signal")],
    "within a step": [(4, "signal within")],
    "error within a step": [(4, "error within")],
    "error in validation": [(4, "error in validation")],
    "twice": [(2, "signal"), (5, "signal within")],
    "twice in one step": [(3, "signal"), (4, "signal")],
    "power cut": [(5, "power cut")],
    "power cut, then an error": [(4, "power cut"), (5, "error within")],
}
PACKING, WORKERS = (True, False), (0, 2)
MATRIX = list(itertools.product(TUNERS, WAYS, PACKING, WORKERS))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, gpt2_with_dropout: Path, chats: Path) -> Any:
    """The run that was never interrupted, of a tuner and a packing: folder and trace; made once."""
    made: dict[tuple[str, bool], tuple[Path, Trace]] = {}

    def get(tuner: str, packing: bool) -> tuple[Path, Trace]:
        if (tuner, packing) not in made:
            folder = tmp_path_factory.mktemp("straight")
            trace, *_ = start(folder, gpt2_with_dropout, chats, packing=packing, **OPTIONS, **TUNERS[tuner])
            made[tuner, packing] = folder, trace
        return made[tuner, packing]

    return get


OPTIONS: dict[str, Any] = {
    "steps": 7,
    "tokens_per_step": 400,
    "tokens_per_batch": 200,
    "val_every": 2,
    "checkpoints": {"every_steps": 2},
    "samples": 1,
}


def slow_but_some(case: tuple[str, str, bool, int]) -> Any:
    """One in eight runs in plain pytest: every way twice, every tuner with each packing and number of workers."""
    tuner, way, packing, workers = case
    row, column = list(TUNERS).index(tuner), list(WAYS).index(way)
    corner = PACKING.index(packing) * 2 + WORKERS.index(workers)
    chosen = (row + column) % 2 == 0 and corner == (row + column // 2) % 4
    return pytest.param(*case, id="-".join(map(str, case)), marks=() if chosen else pytest.mark.slow)


@pytest.mark.parametrize(("tuner", "way", "packing", "workers"), map(slow_but_some, MATRIX))
def test_f1_interrupted_is_straight(
    tuner: str,
    way: str,
    packing: bool,
    workers: int,
    straight: Any,
    tmp_path: Path,
    gpt2_with_dropout: Path,
    chats: Path,
) -> None:
    folder, whole = straight(tuner, packing)
    options = OPTIONS | TUNERS[tuner] | {"packing": packing, "workers": workers}
    rows: dict[int, list[int]] = {}
    rates: dict[int, float] = {}
    for piece, (stop, how) in enumerate([*WAYS[way], (None, "signal")]):
        trace, outcome, _ = start(
            tmp_path, gpt2_with_dropout, chats, stop_at=stop, how=how, resume=piece > 0, **options
        )
        assert (outcome is None) == (stop is not None)
        rows |= trace.rows
        rates |= trace.lrs
    assert rows == whole.rows and rates == whole.lrs
    assert_same_run(folder, tmp_path)


def test_the_matrix_has_teeth(tmp_path: Path, straight: Any, gpt2_with_dropout: Path, chats: Path) -> None:
    """Another seed, of which everything random follows, is another run."""
    folder, _ = straight("lora", True)
    start(tmp_path, gpt2_with_dropout, chats, seed=1, **OPTIONS, **TUNERS["lora"])
    with pytest.raises(AssertionError):
        assert_same_run(folder, tmp_path)


@pytest.mark.slow
def test_f1_two_processes_interrupted_are_straight(tmp_path: Path, gpt2_with_dropout: Path, chats: Path) -> None:
    """A signal to the second of two gloo processes, within a step; gone on with by two, and by one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, tests = Path(__file__).with_name("resume_in_two.py"), Path(__file__).parents[1]
    words = [sys.executable, script, tmp_path, gpt2_with_dropout, chats, json.dumps(TUNERS)]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (tests.parent, tests, tests / "engine")))
    with open(tmp_path / "log", "w") as log:
        pair = [
            subprocess.Popen([str(w) for w in words], env=env | {"LOCAL_RANK": str(rank)}, stdout=log, stderr=log)
            for rank in (0, 1)
        ]
        try:
            codes = [process.wait(300) for process in pair]
        finally:
            for process in pair:
                process.kill()
    assert codes == [0, 0], (tmp_path / "log").read_text()[-3000:]
    for tuner in TUNERS:
        straight = tmp_path / tuner / "straight"
        assert last(tmp_path / tuner / "stopped")["global_step"] == 3
        assert_same_run(straight, tmp_path / tuner / "resumed")
        trace, *_ = start(tmp_path / tuner / "stopped", gpt2_with_dropout, chats, resume=True, **STEPS, **TUNERS[tuner])
        assert sorted(trace.rows) == [3, 4, 5]  # the remaining steps; which rows are in a step never depends on ranks
        alone, two = last(tmp_path / tuner / "stopped"), last(straight)
        assert alone["global_step"] == two["global_step"] == 6
