"""What is known of a job before its row: the class that is woken is the one that the row waits in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis

from loractl.common.placement.lines import vram_class
from loractl.common.queue.hints import queue_name
from loractl.common.queue.valkey import broker_url
from loractl.common.settings import load_settings
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.submit.intake import enqueue
from loractl.scheduler.why.answer import Why, why

from ....databases import SQLITE_ALONE
from ....services import free_port
from ...factories import node_state, submission

pytestmark = SQLITE_ALONE


@pytest.mark.parametrize(
    "keys",
    [
        {"lora": 14, "qlora": 6},
        {"lora": 14, "qlora": 6, "lora_patience": "1h", "method": "auto"},
        {"lora": 14, "qlora": 6, "lora_patience": "0s", "method": "auto"},
        {"lora": 14, "qlora": 6, "method": "qlora"},
        {"lora": None, "qlora": None},
    ],
)
def test_the_need_before_the_row_is_the_row_s(store: Store, keys: dict[str, Any]) -> None:
    planned = submission(**keys)
    job = store.jobs.get(store.jobs.submit(planned))
    assert (planned.first_need, vram_class(planned.first_need)) == (job.vram_needed, job.vram_class)


def test_a_queued_job_leaves_one_hint_in_the_queue_of_its_class(store: Store, home: Path) -> None:
    settings = load_settings({"LORACTL_HOME": str(home)})
    broker_url(settings)  # as the home's worker starts it
    entry = enqueue(submission(lora=14, qlora=None, method="lora"), settings, store)
    assert entry.sentence == f"Job {entry.job_id} (tiny) is queued."
    client = redis.Redis(unix_socket_path=str(settings.runtime_dir / "valkey.sock"))
    assert client.llen(queue_name(store.jobs.get(entry.job_id).vram_class)) == 1


def test_what_no_card_could_hold_and_what_has_to_wait_is_said_at_submit_with_the_way_out(
    store: Store, home: Path
) -> None:
    settings = load_settings({"LORACTL_HOME": str(home)})
    store.cards.see(node_state("heron:0", total=48 * GIB, max_jobs=1))

    def told(**keys: Any) -> tuple[int, str]:
        entry = enqueue(submission(**keys), settings, store)
        return entry.job_id, " ".join(entry.warnings[1:])  # the first is about the data

    assert told(lora=20, method="lora") == (1, "")
    claim = store.attempts.claim("heron:0")
    assert isinstance(claim, Claim)
    store.attempts.beat(claim, Progress(step=5, total_steps=10, eta_seconds=3600))
    number, said = told(lora=20, method="lora")
    assert said.startswith(f"Note: job {number} is expected to start about ") and said.endswith(" on heron:0.")
    for keys, why_not, way in (
        ({"lora": 99, "qlora": 60}, "needs 60.0 GiB, and the largest card has 48.0 GiB", "plan 3 --solve"),
        ({"lora": 99, "qlora": 40, "method": "lora"}, "needs 99.0 GiB", "edit 4 --set method=qlora"),
        ({"resources": {"node_labels": {"site": "roof"}}}, "no box has the label site=roof", "node_labels={}'"),
    ):
        number, said = told(**keys)
        assert said.startswith(f"Warning: job {number} can't start: {why_not}"), said
        assert said.endswith(f"; loractl why {number} says what helps.")
        answer = why(store, number)
        assert isinstance(answer, Why) and answer.wait.command.endswith(way), answer.wait


@pytest.mark.timeout(30)
def test_with_the_queue_away_the_job_is_in_the_database_all_the_same(store: Store, tmp_path: Path) -> None:
    url = f"redis://:hunter2@127.0.0.1:{free_port()}/0"
    settings = load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_REDIS_URL": url})
    entry = enqueue(submission(), settings, store)
    assert store.jobs.get(entry.job_id).queue_key is not None
    *_, away, safe = entry.warnings
    assert away.startswith("Warning: the queue is unreachable at redis://:***@127.0.0.1:")
    assert safe == f"Job {entry.job_id} is safe in the database; workers find it there within seconds."
