"""What of a training's checkpoints lies in the artifact store while it goes on."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest

from loractl.common.artifacts import ArtifactStore, Manifest
from loractl.common.binding import checkpoint_binding
from loractl.common.errors import ServiceUnreachable
from loractl.common.job.status import Reason, Status
from loractl.common.store.records import Claim, Progress, StoredCheckpoint
from loractl.common.store.store import AttemptVerbs, Store
from loractl.worker.attempt import checkpoint_upload
from loractl.worker.attempt.checkpoint_upload import CheckpointUpload
from loractl.worker.attempt.storage.client import CallWatch, StoreClient

from ...databases import SQLITE_ALONE
from ..factories import submission, take

pytestmark = SQLITE_ALONE


def test_the_newest_is_kept_the_one_before_goes_and_a_step_that_was_saved_twice_stays(
    store: Store, tmp_path: Path
) -> None:
    """A step comes twice when its local files were torn and the training went back to older ones."""
    artifacts = ArtifactStore((tmp_path / "artifacts").as_uri())
    job_id = store.jobs.submit(submission())
    claim = take(store)
    assert isinstance(claim, Claim)
    keeper = CheckpointUpload(StoreClient(artifacts.url), store, claim, tmp_path / "keeping")
    held = tmp_path / "artifacts" / "jobs" / str(job_id) / "checkpoints"
    for turn, step in enumerate((5, 10, 10)):
        saved = tmp_path / f"save-{turn}"
        saved.mkdir()
        (saved / "state").write_text(f"{turn}")
        keeper.offer(saved, step)
        _until_taken(tmp_path / "keeping" / f"step-{step}")
        assert [path.name for path in held.iterdir()] == [f"1-{step}"]
    for _ in range(2):
        keeper.offer(saved, 15)  # also while the first of them still waits
    _until_taken(tmp_path / "keeping" / "step-15")
    keeper.close()
    kept = store.jobs.get(job_id).checkpoint
    assert kept is not None and kept["step"] == 15
    assert artifacts.read_bytes(checkpoint_binding(StoredCheckpoint(**kept)), "state") == b"2"


class NoProcess(StoreClient):
    """The store of a box that once has no process to give."""

    failing = True

    def watched(self, watch: CallWatch) -> NoProcess:
        return NoProcess(self.url, watch)

    def put_result(self, folder: Path, prefix: str) -> Manifest:
        if NoProcess.failing:
            NoProcess.failing = False
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return super().put_result(folder, prefix)


def test_an_unexpected_error_ends_no_upload(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_upload, "AGAIN_S", 0.1)
    job_id = store.jobs.submit(submission())
    claim = take(store)
    assert isinstance(claim, Claim)
    client = NoProcess((tmp_path / "artifacts").as_uri())
    keeper = CheckpointUpload(client, store, claim, tmp_path / "keeping")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state").write_text("1")
    keeper.offer(saved, 5)
    _until_taken(tmp_path / "keeping" / "step-5")
    keeper.close()
    kept = store.jobs.get(job_id).checkpoint
    assert kept is not None and kept["step"] == 5


class Cleaned(StoreClient):
    """The store of an attempt whose folder is removed while its first checkpoint is on its way."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url)
        self.folder = folder
        self.removed = threading.Event()

    def watched(self, watch: CallWatch) -> Cleaned:
        return self

    def put_result(self, folder: Path, prefix: str) -> Manifest:
        if not self.removed.is_set():
            shutil.rmtree(self.folder)
            self.removed.set()
        return super().put_result(folder, prefix)


@pytest.mark.parametrize("ends", [True, False])
def test_a_copy_that_is_removed_on_its_way_is_no_checkpoint_and_after_the_attempt_s_end_no_fault(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, ends: bool
) -> None:
    job_id = store.jobs.submit(submission())
    claim = take(store)
    assert isinstance(claim, Claim)
    client = Cleaned((tmp_path / "artifacts").as_uri(), tmp_path / "keeping")
    keeper = CheckpointUpload(client, store, claim, client.folder)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state").write_text("1")
    keeper.offer(saved, 5)
    if ends:
        keeper.close()
    assert client.removed.wait(20)
    if not ends:
        keeper.offer(saved, 10)
        _until_taken(client.folder / "step-10")
    keeper.close()
    assert keeper.done(20)
    kept, held = store.jobs.get(job_id).checkpoint, [path.parent.name for path in tmp_path.rglob("manifest.json")]
    assert (kept and kept["step"], held) == ((None, []) if ends else (10, ["1-10"]))
    told = [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert told == ([] if ends else [f"job {job_id}: the checkpoint of step 5 was removed before it was stored"])


class Counted(StoreClient):
    """Counts what is uploaded; the first removal fails."""

    uploads = 0
    removals = 0

    def watched(self, watch: CallWatch) -> Counted:
        return self

    def put_result(self, folder: Path, prefix: str) -> Manifest:
        self.uploads += 1
        return super().put_result(folder, prefix)

    def remove_checkpoint(self, prefix: str) -> None:
        self.removals += 1
        if self.removals == 1:
            raise ServiceUnreachable("the artifact store", self.url, "LORACTL_ARTIFACTS_URL", "it is away")
        super().remove_checkpoint(prefix)


class AwayAtFirst(AttemptVerbs):
    """A database that is away for three tries."""

    tries = 0

    def keep_checkpoint(self, claim: Claim, checkpoint: StoredCheckpoint) -> bool:
        self.tries += 1
        if self.tries <= 3:
            raise ServiceUnreachable("the database", "it", "LORACTL_DATABASE_URL", "it is away")
        return super().keep_checkpoint(claim, checkpoint)


def test_what_is_stored_waits_for_the_database_without_being_stored_again_and_no_older_one_stays(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_upload, "AGAIN_S", 0.05)
    job_id = store.jobs.submit(submission())
    claim = take(store)
    assert isinstance(claim, Claim)
    client = Counted((tmp_path / "artifacts").as_uri())
    store.attempts = AwayAtFirst(store.begin)
    keeper = CheckpointUpload(client, store, claim, tmp_path / "keeping")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state").write_text("1")
    for step in (5, 10, 15):
        keeper.offer(saved, step)
        _until_taken(tmp_path / "keeping" / f"step-{step}")
    keeper.close()
    assert keeper.done(20)
    assert client.uploads == 3, "one for each checkpoint"
    held = tmp_path / "artifacts" / "jobs" / str(job_id) / "checkpoints"
    assert [path.name for path in held.iterdir()] == ["1-15"]


class AnswerLost(AttemptVerbs):
    """A database that writes, and goes away before it says so; it is back when the lease is over."""

    tries = 0

    def keep_checkpoint(self, claim: Claim, checkpoint: StoredCheckpoint) -> bool:
        kept: bool = super().keep_checkpoint(claim, checkpoint)
        self.tries += 1
        if self.tries > 1:
            return kept
        self.finish(claim, Reason.WORKER_LOST, "it was not heard of", Progress())
        raise ServiceUnreachable("the database", "it", "LORACTL_DATABASE_URL", "it is away")


def test_what_the_row_names_stays_though_its_attempt_has_lost_the_lease_by_the_next_try(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_upload, "AGAIN_S", 0.05)
    job_id, claim = store.jobs.submit(submission()), take(store)
    assert isinstance(claim, Claim)
    store.attempts = verbs = AnswerLost(store.begin)
    keeper = CheckpointUpload(Counted((tmp_path / "artifacts").as_uri()), store, claim, tmp_path / "keeping")
    (saved := tmp_path / "saved").mkdir()
    (saved / "state").write_text("1")
    keeper.offer(saved, 5)
    _until_taken(tmp_path / "keeping" / "step-5")
    keeper.close()
    assert keeper.done(20) and verbs.tries == 2
    row = store.jobs.get(job_id)
    assert row.status is Status.QUEUED and row.checkpoint is not None and row.checkpoint["step"] == 5
    held = tmp_path / "artifacts" / "jobs" / str(job_id) / "checkpoints"
    assert [path.name for path in held.iterdir()] == ["1-5"]


class Slow(StoreClient):
    """A store whose removals are given up where nobody waits for them any more."""

    def watched(self, watch: CallWatch) -> Slow:
        return Slow(self.url, watch)

    def put_result(self, folder: Path, prefix: str) -> Manifest:
        return ArtifactStore(self.url).put_result(folder, prefix)

    def remove_checkpoint(self, prefix: str) -> None:
        if self.watch.over():
            raise ServiceUnreachable("the artifact store", self.url, "LORACTL_ARTIFACTS_URL", "it was given up")
        ArtifactStore(self.url).remove_checkpoint(prefix)


def test_a_checkpoint_that_is_stored_after_its_attempt_has_ended_is_removed(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = store.jobs.submit(submission())
    claim = take(store)
    assert isinstance(claim, Claim)
    client = Slow((tmp_path / "artifacts").as_uri(), CallWatch(over=lambda: True))
    keeper = CheckpointUpload(client, store, claim, tmp_path / "keeping")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state").write_text("1")
    store.attempts.finish(claim, Reason.CANCELLED, "enough", Progress())
    keeper.offer(saved, 5)
    _until_taken(tmp_path / "keeping" / "step-5")
    keeper.close()
    assert keeper.done(20) and not list((tmp_path / "artifacts" / "jobs" / str(job_id)).rglob("state"))
    assert caplog.text == ""


def test_a_checkpoint_is_stored_where_files_have_no_second_names_and_one_that_can_t_be_kept_ends_no_training(
    store: Store, tmp_path: Path
) -> None:
    job_id = store.jobs.submit(submission())
    claim = take(store)
    assert isinstance(claim, Claim)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:  # a link to another disk is refused
        keeper = CheckpointUpload(StoreClient((tmp_path / "artifacts").as_uri()), store, claim, tmp_path / "keeping")
        (Path(other) / "state").write_text("1")
        keeper.offer(Path(other), 5)
        _until_taken(tmp_path / "keeping" / "step-5")
        shutil.rmtree(tmp_path / "keeping")
        (tmp_path / "keeping").write_text("where no folder can be made")
        keeper.offer(Path(other), 10)
        keeper.close()
    kept = store.jobs.get(job_id).checkpoint
    assert kept is not None and kept["step"] == 5


def _until_taken(aside: Path) -> None:
    deadline = time.monotonic() + 20
    while aside.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
