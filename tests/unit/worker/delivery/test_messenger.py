"""The node's messenger: from a job's end to a receiver, and through the death of a sender."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loractl.common.channels import Channel
from loractl.common.job.status import Reason
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.worker.delivery.messenger import Messenger

from .... import receivers
from ....databases import SQLITE_ALONE
from ...factories import RESULT, submission, take
from .due import WEBHOOK_SECRET

SENDER = """
import sys, time
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.store import Store
from loractl.worker.delivery.messenger import Messenger

settings = load_settings()
Messenger(Store(make_engine(settings.database_url)), settings, lease_s=float(sys.argv[1]), look_s=0.05).start()
time.sleep(60)
"""


def config(home: Path, url: str) -> None:
    file = home / "config.toml"
    file.write_text(f'[channels.ops]\nkind = "webhook"\nurl = "{url}"\nsecret = "{WEBHOOK_SECRET}"\n')
    file.chmod(0o600)


def wait(what: Callable[[], object]) -> None:
    over = time.monotonic() + 20
    while not what():
        assert time.monotonic() < over
        time.sleep(0.02)


def finished(store: Store) -> int:
    job_id = store.jobs.submit(submission(name="triage-r32", notify=["ops"]))
    claim = take(store)
    assert isinstance(claim, Claim)
    store.attempts.finish(claim, Reason.OK, "better, loss 4.49 -> 0.25", Progress(), RESULT)
    return job_id


def test_a_sender_killed_between_sending_and_marking_is_followed_by_another_with_the_same_id(
    upgraded_url: str, tmp_path: Path
) -> None:
    store = Store(make_engine(upgraded_url))
    environ = {**os.environ, "LORACTL_HOME": str(tmp_path), "LORACTL_DATABASE_URL": upgraded_url}
    with receivers.receiver(receivers.hang, receivers.status(204)) as ops:
        config(tmp_path, ops.url)
        finished(store)
        first = subprocess.Popen([sys.executable, "-c", SENDER, "3"], env=environ)
        try:
            wait(lambda: ops.requests)  # the receiver has it, the sender does not know
        finally:
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
        messenger = Messenger(store, load_settings(environ), look_s=0.05)
        messenger.start()
        wait(lambda: len(ops.requests) == 2)
        wait(lambda: not messenger.send_due())
        messenger.stop()
    one, other = ops.requests
    assert one.headers["webhook-id"] == other.headers["webhook-id"]
    assert one.json["id"] == other.json["id"]
    assert other.json["data"]["subject"] == "triage-r32: better, loss 4.49 -> 0.25"


@SQLITE_ALONE
def test_no_secret_and_no_answer_gets_into_a_log_or_a_history(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with receivers.receiver(receivers.status(404)) as ops:
        config(tmp_path, ops.url)
        settings = load_settings({"LORACTL_HOME": str(tmp_path)})
        job_id = finished(store)
        assert Messenger(store, settings).send_due()
    history = [event.text for event in store.jobs.events(job_id) if event.kind == "notify"]
    assert len(history) == 1 and history[0].endswith("to channel ops: gave up after 1 tries: HTTP 404")
    for text in (caplog.text, history[0], repr(settings), repr(settings.channels)):
        assert "S3CRET" not in text and "ANSWER" not in text and WEBHOOK_SECRET not in text


@SQLITE_ALONE
def test_a_node_without_channels_starts_no_thread(store: Store, tmp_path: Path) -> None:
    settings = load_settings({"LORACTL_HOME": str(tmp_path)})
    messenger = Messenger(store, settings)
    messenger.start()
    assert messenger._thread is None
    assert settings.channels == ()
    messenger.stop()


def test_one_channel_that_fails_does_not_keep_the_others_waiting(store: Store, tmp_path: Path) -> None:
    with receivers.receiver(receivers.status(500)) as bad, receivers.receiver(receivers.status(204)) as good:
        config(tmp_path, bad.url)
        (ops,) = load_settings({"LORACTL_HOME": str(tmp_path)}).channels
        fine = Channel(name="fine", kind="slack", url=good.url)
        store.jobs.submit(submission(notify=["ops", "fine"]))
        claim = take(store)
        assert isinstance(claim, Claim)
        store.attempts.finish(claim, Reason.OK, "fine", Progress(), RESULT)
        settings = load_settings({"LORACTL_HOME": str(tmp_path / "other")})
        object.__setattr__(settings, "channels", (ops, fine))
        messenger = Messenger(store, settings)
        assert messenger.send_due() and messenger.send_due()
        assert not messenger.send_due(), "the one waits for its next try"
    assert (len(bad.requests), len(good.requests)) == (1, 1)
