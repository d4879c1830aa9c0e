"""What a box that lost its power may have left half written is not built upon."""

from __future__ import annotations

from pathlib import Path

import pytest

from loractl.common.artifacts import ArtifactStore, checkpoint_prefix
from loractl.common.job.method import Method
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, StoredCheckpoint
from loractl.common.store.store import Store
from loractl.worker.attempt.supervisor import Drain, Supervisor, mark_ready, ready_result
from loractl.worker.device.devices import CpuDevice
from loractl.worker.protocol.marker import MARKER, close_checkpoint, is_complete

from .. import factories


def claim(attempt: int = 1, checkpoint: StoredCheckpoint | None = None) -> Claim:
    return Claim(
        job_id=1, attempt=attempt, token=f"token-{attempt}", user="ada", spec=factories.spec(), data={},
        method=Method.LORA, vram_planned=None, checkpoint=checkpoint,
    )  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """An attempt's folder whose result is complete."""
    adapter = tmp_path / "attempt-1" / "result" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    mark_ready(tmp_path / "attempt-1", claim(), "6 steps")
    return tmp_path / "attempt-1"


def test_a_finished_result_is_taken_over_by_the_next_attempt(finished: Path) -> None:
    assert ready_result(finished, claim(attempt=2)) == "6 steps"


@pytest.mark.parametrize("torn", ["truncated", "gone", "note"])
def test_a_torn_result_is_not(finished: Path, torn: str) -> None:
    weights = finished / "result" / "adapter" / "adapter_model.safetensors"
    if torn == "truncated":
        weights.write_bytes(b"weig")
    elif torn == "gone":
        weights.unlink()
    else:
        note = finished / "ready.json"
        note.write_bytes(note.read_bytes()[:-5])
    assert ready_result(finished, claim(attempt=2)) is None


def checkpoint(folder: Path, step: int = 5) -> Path:
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(bytes(100))
    close_checkpoint(folder, step=step, finished=False, belongs_to={})
    return folder


@pytest.mark.parametrize("whole", [True, False])
def test_a_stored_checkpoint_is_fetched_when_the_local_one_is_torn(tmp_path: Path, whole: bool) -> None:
    settings = load_settings({"LORACTL_HOME": str(tmp_path)})
    artifacts = ArtifactStore(settings.artifacts_url)
    local = checkpoint(settings.work_dir / "1" / "attempt-1" / "checkpoints" / "checkpoint-5")
    kept = StoredCheckpoint(step=5, prefix=checkpoint_prefix(1, 1, 5))
    artifacts.put_result(local, kept.prefix)
    if not whole:
        (local / "optimizer.pt").write_bytes(bytes(50))
    assert (local / MARKER).exists() and is_complete(local) is whole
    store = Store(make_engine(settings.database_url))
    supervisor = Supervisor(settings, store, artifacts, CpuDevice(total=1), "box:0", Drain(tmp_path / "drain"), 1)
    fetched = supervisor._stored_checkpoint(claim(attempt=2, checkpoint=kept), settings.work_dir / "1" / "stored")
    assert bool(fetched) is not whole
    assert all(is_complete(folder / "checkpoint-5") for folder in fetched)
