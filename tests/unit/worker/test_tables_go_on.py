"""A worker whose tables are migrated on beneath it, by a newer loractl: no job is lost, and it says why it ends."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from loractl.common.errors import SchemaMismatch
from loractl.common.job.status import Status
from loractl.common.store.database import make_engine
from loractl.common.store.schema import HEAD

from ...held_lab import LEASE_S, HeldLab, held_lab

pytestmark = pytest.mark.both

NEWER = ("ALTER TABLE jobs RENAME COLUMN loss TO last_loss", "UPDATE alembic_version SET version_num = '9999'")
SAME = ("ALTER TABLE jobs RENAME COLUMN last_loss TO loss", f"UPDATE alembic_version SET version_num = '{HEAD}'")


@pytest.fixture
def lab(upgraded_url: str, home: Path, tmp_path: Path) -> Iterator[HeldLab]:
    engine = make_engine(upgraded_url, connections=8)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # a node sends it to itself, which ends Celery
    with held_lab(home, tmp_path, engine) as lab:
        yield lab
    signal.signal(signal.SIGTERM, before)
    engine.dispose()


def go_on(lab: HeldLab, steps: tuple[str, ...]) -> None:
    with lab.engine.begin() as connection:
        for step in steps:
            connection.exec_driver_sql(step)


def test_a_worker_whose_tables_go_on_gives_its_job_up_and_says_in_a_sentence_what_to_do(
    lab: HeldLab, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = lab.submit("--set=training.save_steps=10", steps=300)
    (place,) = lab.start()
    lab.until(job_id, lambda job: job.has_checkpoint)
    caplog.clear()
    go_on(lab, NEWER)

    began = lab.clock.now()
    while lab.alive:
        assert lab.clock.now() < began + 60
        lab.clock.sleep(0.1)
    lab.stop()
    assert lab.clock.now() < began + 60, "nothing waits for a database that will never answer"
    assert isinstance(place.drain.why, SchemaMismatch)
    assert place.drain.why.hint == "upgrade loractl on this machine, then start it again"
    sentence = f"the database is at revision 9999, this loractl needs revision {HEAD}"
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    leaves = f"{sentence}: heron:0 claims nothing more, and ends once its jobs have saved a checkpoint"
    assert leaves in told and all(sentence in line for line in told), told
    assert not [record for record in caplog.records if record.exc_info], "no traceback"
    with pytest.raises(SchemaMismatch, match=sentence):
        lab.store.jobs.get(job_id)  # as whatever runs meanwhile asks: status --watch, job.wait(), a page

    go_on(lab, SAME)
    lab.clock.sleep(2 * LEASE_S)
    lab.start()
    done = lab.until(job_id, lambda job: job.status.is_terminal, seconds=300)
    assert (done.status, lab.starts) == (Status.SUCCEEDED, [f"{job_id}.1", f"{job_id}.2"])
    assert (lab.store.attempts.of_job(job_id)[1].resumed_from_step or 0) >= 10
