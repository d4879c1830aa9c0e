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
from loractl.common.store.store import Store
from loractl.scheduler.submit.intake import enqueue

from ....databases import SQLITE_ALONE
from ....services import free_port
from ...factories import submission

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


@pytest.mark.timeout(30)
def test_with_the_queue_away_the_job_is_in_the_database_all_the_same(store: Store, tmp_path: Path) -> None:
    url = f"redis://:hunter2@127.0.0.1:{free_port()}/0"
    settings = load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_REDIS_URL": url})
    entry = enqueue(submission(), settings, store)
    assert store.jobs.get(entry.job_id).queue_key is not None
    *_, away, safe = entry.warnings
    assert away.startswith("Warning: the queue is unreachable at redis://:***@127.0.0.1:")
    assert safe == f"Job {entry.job_id} is safe in the database; workers find it there within seconds."
