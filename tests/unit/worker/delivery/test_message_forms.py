"""A message as each receiver gets it, and what a hostile text in it can't do."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import sys
from pathlib import Path

import pytest

from loractl.common.channels import Channel
from loractl.common.store.records import Delivery
from loractl.worker.delivery.messenger import deliver
from loractl.worker.delivery.sending import mail

from .... import receivers
from .due import WEBHOOK_SECRET, due

HOSTILE = "x\r\nBcc: all@lab.example\r\nX-Admin: yes <!channel> @everyone & <b>"


def posted(channel: Channel, **said: str) -> receivers.Received:
    """What the receiver of a channel gets of a message; its url is a path."""
    with receivers.receiver(receivers.status(200)) as made:
        url = f"http://127.0.0.1:{made.port}{channel.url}"
        there = Channel(name=channel.name, kind=channel.kind, url=url, secret=channel.secret)
        assert deliver(there, due(**said)) == Delivery(sent=True)
    (request,) = made.requests
    assert "X-Admin" not in request.headers
    return request


def test_a_webhook_is_signed_as_standard_webhooks_say() -> None:
    request = posted(Channel(name="ops", kind="webhook", url="/hook", secret=WEBHOOK_SECRET), text=HOSTILE)
    headers = request.headers
    signed = b".".join((b"msg_7", headers["webhook-timestamp"].encode(), request.body))
    right = base64.b64encode(hmac.new(b"k" * 32, signed, hashlib.sha256).digest()).decode()
    assert (headers["webhook-id"], headers["webhook-signature"]) == ("msg_7", f"v1,{right}")
    assert request.json["type"] == "job.succeeded"
    assert request.json["data"]["subject"] == "triage-r32: better, loss 4.49 -> 0.25"


def test_ntfy_gets_json_so_that_no_text_is_in_a_header() -> None:
    request = posted(Channel(name="ops", kind="ntfy", url="/lab-topic", secret="tk_S3CRET"), subject=HOSTILE)
    assert request.line == "POST / HTTP/1.1"
    assert request.headers["Authorization"] == "Bearer tk_S3CRET"
    assert (request.json["topic"], request.json["title"]) == ("lab-topic", HOSTILE)


def test_no_text_of_a_job_mentions_anybody_on_slack_or_discord() -> None:
    slack = posted(Channel(name="ops", kind="slack", url="/services/T/B/x"), subject=HOSTILE).json["text"]
    assert "&lt;!channel&gt;" in slack and "&amp; &lt;b&gt;" in slack and "<" not in slack
    discord = posted(Channel(name="ops", kind="discord", url="/api/webhooks/1/x"), text=HOSTILE + "y" * 5000).json
    assert discord["allowed_mentions"] == {"parse": []}
    assert len(discord["content"]) <= 2000


def test_no_text_adds_a_header_to_a_mail() -> None:
    channel = Channel(name="ops", kind="mail", url="smtp://x", sender="loractl@lab.example", to=("ada@lab.example",))
    fine = mail(channel, due())
    assert (fine["Subject"], fine["Message-ID"]) == ("triage-r32: better, loss 4.49 -> 0.25", "<msg_7@loractl.invalid>")
    refused = deliver(channel, due(subject=HOSTILE))
    assert (refused.sent, refused.again) == (False, False)


def test_a_command_gets_the_message_on_its_stdin_and_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORACTL_DATABASE_URL", "postgresql://x:S3CRET@db/lab")
    script = (
        "import json, os, sys; json.dump([sys.argv, dict(os.environ), json.load(sys.stdin)], open(sys.argv[1], 'w'))"
    )
    command = (sys.executable, "-c", script, str(tmp_path / "got"))
    assert deliver(Channel(name="ops", kind="command", command=command), due(text="$(reboot)")).sent
    argv, environment, message = json.loads((tmp_path / "got").read_text())
    assert len(argv) == 2
    assert not any(name.startswith("LORACTL") for name in environment)
    assert (message["id"], message["data"]["text"]) == ("msg_7", "$(reboot)")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("sh", "-c", "echo S3CRET; exit 3"), "the command ended with status 3"),
        (("sh", "-c", "sleep 60 & sleep 60"), "the command did not end within 0 s"),
        (("/no/such/program",), "the command can't be started"),
    ],
    ids=["fails", "hangs", "missing"],
)
def test_a_command_that_fails_or_hangs_is_tried_again(command: tuple[str, ...], why: str) -> None:
    delivery = deliver(Channel(name="ops", kind="command", command=command), due(), 0.3)
    assert delivery == Delivery(again=True, why=why)
