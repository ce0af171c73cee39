"""The helper that every multi-process test stands on."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed_helper import DistributedFailure, run_distributed


def total(rank: int, world_size: int, scale: float) -> tuple[int, torch.Tensor, int]:
    x = torch.full((3,), rank * scale, dtype=torch.float64)
    dist.all_reduce(x)
    return rank, x, torch.get_num_threads()


def one_raises(rank: int, world_size: int) -> None:
    print(f"hello from {rank}")
    dist.barrier()  # else rank 1 may be gone while rank 0 is still joining the group
    if rank == 1:
        raise ValueError("wrong on purpose")
    dist.barrier()


def one_hangs(rank: int, world_size: int, folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    with open(f"{folder}/{rank}", "w") as f:
        f.write(f"{os.getpid()} {child.pid}")
    if rank == 0:
        time.sleep(100)
    dist.barrier()


def test_results_come_back_by_rank():
    results = run_distributed(total, 3, 2.0)
    assert [r for r, _, _ in results] == [0, 1, 2]
    assert all(torch.equal(x, torch.full((3,), 6.0, dtype=torch.float64)) and n == 1 for _, x, n in results)


def test_a_rank_that_raises_is_shown_first_with_its_log():
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(one_raises, 2)
    text = str(failure.value)
    assert "wrong on purpose" in text and "hello from 0" in text
    assert text.index("----- rank 1") < text.index("----- rank 0")


def test_a_hang_ends_at_the_timeout_with_stacks_and_no_survivors(tmp_path):
    start = time.monotonic()
    with pytest.raises(DistributedFailure, match="not done at the timeout") as failure:
        run_distributed(one_hangs, 2, str(tmp_path), timeout=4)
    assert time.monotonic() - start < 10
    assert "one_hangs" in str(failure.value)
    for rank in range(2):
        for pid in (tmp_path / str(rank)).read_text().split():
            deadline = time.monotonic() + 5
            while os.path.exists(f"/proc/{pid}") and "Z" not in open(f"/proc/{pid}/stat").read().split()[2]:
                assert time.monotonic() < deadline, f"process {pid} survived"
                time.sleep(0.05)
