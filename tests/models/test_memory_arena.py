"""Tensors on the CPU live in an arena whose freed blocks are used again: a process stays as large as what is alive."""

import subprocess
import sys
import textwrap

import pytest

from litft.models import native

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")


def run(body: str) -> list[str]:
    """The lines that a script prints in a process of its own whose tensors live in the arena."""
    head = "import torch\nfrom litft.models import native\nassert native.use_arena() and native.use_arena()\n"
    done = subprocess.run([sys.executable, "-c", head + textwrap.dedent(body)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_blocks_never_overlap_and_keep_what_was_written():
    run("""
        import random
        random.seed(0)
        alive = {}
        for turn in range(4000):
            if alive and random.random() < 0.5:
                key = random.choice(list(alive))
                assert (alive.pop(key) == key).all(), "somebody else wrote here"
            else:
                alive[turn] = torch.full((random.randint(1, 300_000),), turn, dtype=torch.int32)
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in alive.values())
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
        assert all(t.data_ptr() % 64 == 0 for t in alive.values())
    """)


def test_freed_memory_serves_tensors_of_other_sizes():
    (grown,) = run("""
        def size():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
        torch.ones(1)
        start = size()
        for turn in range(30):  # 200 MB at a time, cut otherwise each time
            parts = [torch.ones(50_000_000 // (3 + turn % 7)) for _ in range(3 + turn % 7)]
            del parts
        print(size() - start)
    """)
    assert float(grown) < 230


def test_workers_forked_from_it_allocate_as_well():
    (total,) = run("""
        from torch.utils.data import DataLoader
        kept = [torch.zeros(100_000) for _ in range(5)]
        loader = DataLoader(range(8), num_workers=2, collate_fn=lambda rows: torch.full((200_000,), float(rows[0])))
        print(int(sum(batch.mean() for batch in loader)))
    """)
    assert total == "28"


def test_threads_share_it():
    run("""
        from concurrent.futures import ThreadPoolExecutor
        def work(n):
            for i in range(300):
                x = torch.full((20_000 + 37 * i,), n)
                assert (x == n).all()
        list(ThreadPoolExecutor(4).map(work, range(8)))
    """)
