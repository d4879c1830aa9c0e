"""Room on the disk: how much a run may write, and what is said when it is not there."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path

import pytest

from loractl.common.job.method import Method
from loractl.common.job.status import Reason, Status
from loractl.common.units import GIB
from loractl.worker.attempt.order import LEAST_BYTES, bytes_to_write, require_space

from ...held_lab import HeldLab
from ..factories import spec

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


def test_a_small_or_unknown_model_needs_the_least() -> None:
    assert bytes_to_write(spec(), Method.LORA) == LEAST_BYTES


def test_a_large_adapter_needs_its_checkpoints_and_its_optimizer_state(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    job = spec(base_model=str(tmp_path), lora={"r": 64})
    weights = 167_772_160  # of rank 64 on all linear layers of Llama 3 8B, as peft counts them
    for method, state in ((Method.LORA, 8), (Method.QLORA, 2)):
        checkpoints = 4 * weights * (4 + state)
        assert checkpoints < bytes_to_write(job, method) < checkpoints + weights * 4 + GIB
    assert bytes_to_write(job, Method.LORA, data_bytes=GIB) > bytes_to_write(job, Method.LORA) + 4 * GIB


def test_a_disk_without_the_room_is_named_with_what_is_free(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        (disk / "work" / "7").mkdir(parents=True)
        with pytest.raises(OSError) as caught:
            require_space(disk / "work" / "7", 5 * GIB)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.strerror == f"needs 5.0 GiB on {disk}, 0.1 are free"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_without_room_ends_the_attempt_before_it_trains_and_spends_no_retry(held: HeldLab) -> None:
    work = held.home / "work"
    work.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(work)], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        held.submit("--set=max_retries=0")
        held.start()
        full = held.until(1, lambda job: job.reason)
        assert (full.status, full.reason) == (Status.QUEUED, Reason.DISK_FULL), "though it has no retry to spend"
        assert full.message == f"needs 1.0 GiB on {work}, 0.1 are free"
        assert "failed it (disk_full)" in held.cli("why", 1)
        assert held.starts == []
    finally:
        subprocess.run(["umount", "-l", str(work)], check=True)
    held.until(1, lambda job: job.status is Status.SUCCEEDED)
    assert held.reasons(1) == [Reason.DISK_FULL, Reason.OK], "once there is room it goes on by itself"
