"""What docs/reliability.md promises of stores that are away, of a database that refuses, and of other versions, in a
held lab. Services that are processes, and workers that die meanwhile: tests/acceptance/test_outages.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sqlalchemy import text

from loractl import __version__
from loractl.common.errors import SchemaMismatch
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.memory.correction import ENGINE
from loractl.worker.attempt.trainer_run import CHECKPOINT_GRACE_S
from loractl.worker.protocol.messages import Ended, Start
from loractl.worker.recipe.orders import StopOrder

from ...held_lab import LEASE_S, HeldLab, Train
from ...quick_trainer import Sleep, Tell, train


@pytest.fixture
def away(held: HeldLab) -> Path:
    """In the place of a folder: nothing can be stored until it is gone."""
    file = held.home / "artifacts" / "jobs"
    file.parent.mkdir()
    file.write_text("no folder")
    return file


def test_a_result_waits_for_the_store_in_storing_also_over_a_restart_of_the_worker(held: HeldLab, away: Path) -> None:
    job_id = held.submit()
    first = held.start()
    held.until(job_id, lambda job: job.stage is Stage.STORING)
    held.clock.sleep(2 * LEASE_S)
    waiting = held.store.jobs.get(job_id)
    assert (waiting.status, waiting.stage, waiting.attempt) == (Status.RUNNING, Stage.STORING, 1)
    assert "it is tried again" in held.cli("status", job_id, "--full")

    held.stop(first)
    assert held.store.jobs.get(job_id).status is Status.QUEUED
    assert held.reasons(job_id) == [Reason.DRAINED]
    held.start()
    held.until(job_id, lambda job: job.attempt == 2 and job.stage is Stage.STORING)
    away.unlink()
    held.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert held.starts == [f"{job_id}.1"], "it was trained once"
    assert "its result is taken over" in held.cli("status", job_id, "--full")
    told = re.findall(r"storing +(stores \d+ files, .*, and reads them back)", held.cli("logs", job_id))
    assert len(told) == 2, "both attempts say what they store, and neither spoils the finished result"
    held.cli("adapters", "pull", job_id, held.folder / "pulled")


def _leaves(name: str) -> Train:
    """A trainer that leaves one more file in its result."""

    def does(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
        ended = train(order, stop, tell, sleep)
        (Path(order.output_dir) / "adapter" / name).write_text("{}")
        return ended

    return does


def test_a_result_that_every_store_refuses_is_no_outage_and_holds_no_card(held: HeldLab) -> None:
    job_id, other = held.submit(), held.submit()
    held.start(_leaves("tool\nuse.jinja"))
    held.until(job_id, lambda job: job.status is Status.FAILED, seconds=30)
    assert held.reasons(job_id) == [Reason.BAD_SPEC], "another attempt would leave the same"
    assert "'adapter/tool\\nuse.jinja' is not a valid file name" in (held.store.jobs.get(job_id).message or "")
    held.until(other, lambda job: job.status is Status.FAILED, seconds=30)


def test_a_finished_training_survives_an_outage_that_outlasts_every_attempt_s_patience(
    held: HeldLab, away: Path
) -> None:
    """With a checkpoint that waits for the store, too: it is left after its own patience."""
    job_id = held.submit("--set=max_retries=0", "--set=training.save_steps=4")
    held.start(LORACTL_STORE_PATIENCE="1min", LORACTL_LEASE="60s")
    began = held.clock.now()
    failed = held.until(job_id, lambda job: job.held, seconds=1200)
    assert held.clock.now() - began > 3 * 25, "it was patient three times"
    assert (failed.reason, failed.result_host) == (Reason.STORE_FAILED, "heron")
    assert "the artifact store failed it 3 times in a row" in (failed.message or "")
    history = " ".join(held.cli("status", job_id, "--full").split())
    assert "loractl release lets it start; its finished result stays on heron" in history

    work = held.home / "work" / str(job_id)
    away.unlink()
    gc = json.loads(held.cli("gc", "--json"))
    assert gc["removed"] == [] and work.is_dir(), "it has not failed 30 days ago"
    held.clock.sleep(CHECKPOINT_GRACE_S)  # once the last attempt has cleaned up
    kept = ["checkpoints", "log.txt", "ready.json", "result"]  # of one attempt
    assert sorted(path.name for path in work.glob("attempt-*/*")) == kept
    assert len(list(work.glob("attempt-*/checkpoints/*"))) <= 2, "what stays is bounded"

    held.start_box("owl")
    held.cli("release", job_id)
    held.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert held.starts == [f"{job_id}.1"], "it was trained once"
    assert [attempt.node for attempt in held.store.attempts.of_job(job_id)] == ["heron:0"] * 4
    assert held.store.jobs.get(job_id).result_host is None
    held.clock.sleep(LEASE_S)
    assert not work.exists()
    held.cli("adapters", "pull", job_id, held.folder / "pulled")


def test_values_that_the_database_refuses_are_left_out_and_end_no_training(held: HeldLab) -> None:
    with held.engine.begin() as connection:
        for table, when in (("metrics", "NEW.step = 4"), ("adapters", "1")):
            connection.exec_driver_sql(
                f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} WHEN {when} "
                f"BEGIN SELECT RAISE(ABORT, '{table} are full'); END"
            )
    job_id = held.submit("--set=max_retries=0", steps=20)
    held.start()
    failed = held.until(job_id, lambda job: job.status.is_terminal)
    assert (failed.status, failed.reason) == (Status.FAILED, Reason.TRAINER_ERROR)
    kept = "its result is kept on this box, where the next attempt takes it over"
    assert failed.message == f"the database refused its end: adapters are full; {kept}"
    told = [event.text for event in held.store.jobs.events(job_id) if event.kind == "database"]
    assert len(told) == 1 and told[0].endswith("which is left out: metrics are full")
    steps = [point.step for point in held.store.jobs.metrics(job_id, "loss")]
    assert 4 not in steps and steps[-1] == 20, "the beats went on"

    with held.engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER no_adapters")
    held.cli("retry", job_id)
    held.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert held.starts == [f"{job_id}.1"], "it was trained once"


def test_client_and_worker_of_different_versions_understand_each_other_or_say_why_not(held: HeldLab) -> None:
    poison, newer, older, outdated = (held.submit() for _ in range(4))
    held.change(outdated, engine=ENGINE - 1, vram_lora=1, planned={"lora": 1, "qlora": 1})
    spec = dict(held.store.jobs.get(newer).spec)
    held.change(poison, spec={**spec, "something_new": 1})
    held.change(newer, version="99.0.0", spec={**spec, "something_new": 1})
    added = {"preemptible", "lora_patience", "revision", "labels"}
    held.change(older, version=None, spec={key: value for key, value in spec.items() if key not in added})

    held.start()
    held.until(older, lambda job: job.status is Status.SUCCEEDED)
    planned = held.until(outdated, lambda job: job.status is Status.SUCCEEDED)
    assert (planned.engine, planned.vram_lora) == (ENGINE, held.store.jobs.get(older).vram_lora), (
        "planned for today's steps"
    )
    left = held.until(newer, lambda job: job.message)
    assert (left.status, left.attempt) == (Status.QUEUED, 0), "it is left to a newer worker"
    assert left.message == f"written by loractl 99.0.0, a worker with {__version__} can't read it"
    assert held.until(poison, lambda job: job.status.is_terminal).reason is Reason.BAD_SPEC, "nobody's submit wrote it"
    for command in ("status", "why"):
        assert "99.0.0" in held.cli(command, newer)

    held.change(newer, spec=spec, not_before=None)
    held.until(newer, lambda job: job.status is Status.SUCCEEDED)
    with held.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    refused = held.cli("status", code=SchemaMismatch.exit_code)
    assert "9999" in refused and "Hint: " in refused
