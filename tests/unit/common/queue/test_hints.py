"""Wake-up messages: one queue a class, JSON only, and a queue that is away costs seconds, not minutes."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest
import redis

from loractl.common.errors import ExitCode, ServiceRefused, ServiceUnreachable, UsageError
from loractl.common.placement.lines import VRAM_CLASSES
from loractl.common.queue.app import make_app
from loractl.common.queue.hints import MOST_HINTS, WAKE_TASK, HintQueues, queue_name
from loractl.common.queue.valkey import broker_url, embedded_runs
from loractl.common.settings import load_settings

from .... import services
from ....services import QUEUE_SECRET, wake

pytestmark = pytest.mark.usefixtures("real_services")


@pytest.mark.timeout(30)
def test_a_queue_where_nothing_listens_is_named_within_five_seconds_without_its_password(tmp_path: Path) -> None:
    port = services.free_port()
    environ = {"LORACTL_HOME": str(tmp_path), "LORACTL_REDIS_URL": f"redis://:hunter2@127.0.0.1:{port}/0"}
    began = time.monotonic()
    with pytest.raises(ServiceUnreachable) as caught:
        wake(load_settings(environ), 24)
    assert time.monotonic() - began < 5
    error = caught.value
    assert error.exit_code == ExitCode.UNREACHABLE
    assert error.sentence.startswith(f"the queue is unreachable at redis://:***@127.0.0.1:{port}/0: ")
    assert "hunter2" not in error.sentence
    assert error.hint == "check that it runs, or set LORACTL_REDIS_URL"


@pytest.mark.parametrize("password", [":wrong@", ""])
def test_a_wrong_password_of_the_queue_is_named_with_its_variable(
    redis_url: str, tmp_path: Path, password: str
) -> None:
    url = f"redis://{password}{redis_url.partition('@')[2]}"
    with pytest.raises(ServiceRefused) as caught:
        wake(load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_REDIS_URL": url}), 24)
    assert "the queue at redis://" in caught.value.sentence and "refuses this user" in caught.value.sentence
    assert "check user and password in LORACTL_REDIS_URL" in str(caught.value.hint)


def test_a_wake_up_is_one_json_message_in_the_queue_of_its_class(redis_url: str, tmp_path: Path) -> None:
    wake(load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_REDIS_URL": redis_url}), 24)
    client = redis.Redis.from_url(redis_url)
    assert {c: client.llen(queue_name(c)) for c in VRAM_CLASSES if client.llen(queue_name(c))} == {24: 1}
    message = json.loads(client.lpop("vram.24"))
    assert message["content-type"] == "application/json"
    assert message["headers"]["task"] == WAKE_TASK
    arguments, _, _ = json.loads(base64.b64decode(message["body"]))
    assert arguments == [24]


def test_a_wake_up_goes_over_the_embedded_queue_where_a_worker_has_started_it(home: Path) -> None:
    settings = load_settings({"LORACTL_HOME": str(home)})
    wake(settings, 8)
    assert not embedded_runs(settings), "nobody would hear it"
    broker_url(settings)
    wake(settings, 8)
    wake(settings, 8)
    client = redis.Redis(unix_socket_path=str(settings.runtime_dir / "valkey.sock"))
    assert client.llen("vram.8") == 2


def test_a_wrong_password_is_a_queue_that_cannot_be_reached(redis_url: str, tmp_path: Path) -> None:
    environ = {"LORACTL_HOME": str(tmp_path), "LORACTL_REDIS_URL": redis_url.replace(QUEUE_SECRET, "wrong")}
    with pytest.raises(ServiceUnreachable) as caught:
        wake(load_settings(environ), 8)
    assert "wrong" not in caught.value.sentence.partition(": ")[0]


def test_a_setting_that_is_no_queue_stays_a_mistake_of_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        wake(load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_REDIS_URL": "redis://lab/0"}), 8)


def test_the_app_has_the_options_under_which_no_training_is_started_twice_or_steered() -> None:
    conf = make_app("redis://127.0.0.1/0").conf
    assert {q.name for q in conf.task_queues} == {queue_name(c) for c in VRAM_CLASSES}
    assert conf.accept_content == ["json"], "a pickle from the queue would run code"
    assert not conf.task_acks_late
    assert not conf.worker_enable_remote_control
    assert conf.worker_prefetch_multiplier == 1


def test_a_queue_that_somebody_filled_is_trimmed_and_others_are_left(tmp_path: Path) -> None:
    with services.valkey(tmp_path, "p") as url:
        client = redis.Redis.from_url(url)
        for name, count in (("vram.8", 1000), ("vram.8\x06\x163", 400), ("vram.12", MOST_HINTS), ("else", 1000)):
            client.lpush(name, *range(count))
        client.set("vram.16", "not a queue")
        queues = HintQueues(load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_REDIS_URL": url}))
        assert queues.trim(["vram.8", "vram.12", "vram.16"]) == 1400 - 2 * MOST_HINTS
        assert client.llen("vram.8") == client.llen("vram.8\x06\x163") == client.llen("vram.12") == MOST_HINTS
        assert client.llen("else") == 1000 and client.get("vram.16") == b"not a queue"
        assert client.lindex("vram.8", 0) == b"999", "the newest stay"
        assert queues.trim(["vram.8"]) == 0
        client.connection_pool.disconnect()
    with pytest.raises(ServiceUnreachable):
        queues.trim(["vram.8"])
