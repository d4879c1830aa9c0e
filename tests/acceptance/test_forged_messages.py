"""What somebody can do who writes to the queue and has nothing else: wake nodes, and no more."""

from __future__ import annotations

import base64
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from loractl.common.job.status import Status
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store

from ..conftest import Cli
from ..models import write_job

CARD = "card.box:0"
STRANGE = "\x1b[31mred\x1b]0;title\x07\nforged line"


class Touch:
    """As a pickle: a command that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def message(body: Any = ([8], {}, {}), *, headers: dict[str, Any] | None = None, **changed: Any) -> str:
    """A task's message as Celery writes it, with changes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    properties = {"delivery_tag": os.urandom(8).hex(), "body_encoding": "base64", "delivery_info": {}}
    return json.dumps(
        {
            "body": base64.b64encode(raw).decode(), "content-type": "application/json", "content-encoding": "utf-8",
            "headers": {"task": "loractl.wake", "id": "1", **(headers or {})}, "properties": properties, **changed,
        }
    )  # fmt: skip


def forged(mark: Path) -> list[str | bytes]:
    run = pickle.dumps([[Touch(mark)], {}, {}])
    callbacks = [{"task": "loractl.wake", "args": [8], "options": {"queue": "elsewhere"}}]
    return [
        message(run, **{"content-type": "application/x-python-serialize", "content-encoding": "binary"}),
        message(f"!!python/object/apply:os.system ['touch {mark}']".encode(), **{"content-type": "application/x-yaml"}),
        message(([8], {}, {"callbacks": callbacks, "errbacks": callbacks, "chord": callbacks[0]})),
        message(headers={"id": STRANGE, "shadow": STRANGE, "root_id": STRANGE}),
        message(headers={"task": STRANGE}),
        message(([{"task": "loractl.wake"}, [[1]]], {}, {}), headers={"task": "celery.map"}),
        message(headers={"eta": "2999-01-01T00:00:00+00:00"}),
        message(([1, 2], {"x": 1}, {})),
        message([]),
        message("x"),
        message(headers={"compression": "application/x-gzip"}),
        message(properties={}),
        json.dumps({**json.loads(message()), "headers": [1]}),
        message(**{"content-encoding": "rot13"}),
        json.dumps({"__type__": "datetime", "__value__": 1}),
        "[" * 100_000, "{}", "[]", "5", "null", "no JSON", b"\xff\xfe\x00", b"",
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(120)
def test_no_message_makes_a_node_do_more_than_look_at_the_rows(
    make_cli: Callable[..., Cli], redis_url: str, tiny_model: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "it-ran"
    cli = make_cli(LORACTL_REDIS_URL=redis_url, LORACTL_HOST="box")
    client = redis.Redis.from_url(redis_url)
    cli("submit", write_job(tmp_path, tiny_model))
    client.flushdb()
    for queue in (CARD, "vram.8"):  # more than a node could read while anyone waits
        client.lpush(queue, *[message()] * 20_000)
    client.lpush(CARD, message(headers={"timelimit": [2, 1]}))  # would kill what it starts
    worker = cli.start("worker", warm_start=True)
    try:
        engine = connect(load_settings(cli.environment))
        store = Store(engine)
        _until(lambda: store.jobs.get(1).status is Status.RUNNING)
        messages = forged(mark)
        for text in messages:
            client.lpush(CARD, text)
        client.lpush("elsewhere", "x")
        _until(lambda: store.jobs.get(1).status is Status.SUCCEEDED)
        _until(lambda: client.llen(CARD) == 0)
        assert worker.poll() is None
        assert [attempt.reason.value for attempt in store.attempts.of_job(1) if attempt.reason] == ["ok"]
        engine.dispose()
    finally:
        worker.terminate()
        said = worker.communicate(timeout=60)[0]
    assert client.llen("elsewhere") == 1, "no callback was sent"
    assert not mark.exists(), "a pickle or a YAML tag ran"
    assert "is started again" not in said and "Traceback" not in said, said
    assert "\x1b" not in said and "forged line" not in said, said
    assert "excess messages were on the queue and are discarded" in said, said
    assert said.count("is not a message and is discarded") >= 3, said


def _until(reached: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.2)
