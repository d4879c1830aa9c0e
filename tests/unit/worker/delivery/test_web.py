"""Posting to receivers that misbehave: bounded, followed nowhere, and nothing of an answer is kept."""

from __future__ import annotations

import ssl
import time
from pathlib import Path

import pytest

from loractl.common.channels import Channel
from loractl.common.store.records import Delivery
from loractl.worker.delivery.messenger import deliver

from .... import receivers, tls
from ....services import free_port
from .due import WEBHOOK_SECRET, due

DEADLINE_S = 0.6


def told(url: str) -> Delivery:
    """What comes of one try, which must end soon after its deadline and keep nothing of the receiver or its address."""
    began = time.monotonic()
    delivery = deliver(Channel(name="ops", kind="webhook", url=url, secret=WEBHOOK_SECRET), due(), DEADLINE_S)
    assert time.monotonic() - began < DEADLINE_S + 5
    assert not {"ANSWER", "S3CRET", "elsewhere.example"} & set(delivery.why.replace("-", " ").split())
    return delivery


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (receivers.status(204), Delivery(sent=True)),
        (receivers.status(500), Delivery(again=True, why="HTTP 500")),
        (receivers.status(429, "Retry-After: 120"), Delivery(again=True, why="HTTP 429", after_s=120)),
        (receivers.status(503, "Retry-After: soon"), Delivery(again=True, why="HTTP 503")),
        (receivers.status(410), Delivery(why="HTTP 410")),
        (receivers.endless_body, Delivery(sent=True)),
        (receivers.endless_headers, Delivery(again=True, why="its answer is not HTTP")),
        (receivers.hang, Delivery(again=True, why="it does not answer in time")),
        (receivers.trickle, Delivery(again=True, why="it does not answer in time")),
        (receivers.close, Delivery(again=True, why="the connection broke")),
        (receivers.answer("220 mail.lab ESMTP\n"), Delivery(again=True, why="its answer is not HTTP")),
    ],
    ids="sent 500 429 503 gone endless-body endless-headers hangs trickles closes no-http".split(),  # noqa: SIM905  one line
)
def test_a_receiver_that_misbehaves_costs_bounded_time_and_is_reported_in_our_words(
    behaviour: receivers.Behaviour, expected: Delivery
) -> None:
    with receivers.receiver(behaviour) as ops:
        delivery = told(ops.url)
    assert delivery == expected
    assert len(ops.requests) == 1
    assert ops.requests[0].line == "POST /hook/S3CRET-PATH?key=S3CRET-KEY HTTP/1.1"


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(code: int) -> None:
    with receivers.receiver(receivers.status(204)) as other:
        with receivers.receiver(receivers.status(code, f"Location: {other.url}")) as ops:
            delivery = told(ops.url)
        assert (delivery.sent, delivery.again) == (False, False)
        assert other.connections == 0


def test_a_receiver_that_is_not_there_is_tried_again() -> None:
    assert told(f"http://127.0.0.1:{free_port()}/S3CRET") == Delivery(again=True, why="the connection is refused")


def test_only_a_trusted_certificate_of_the_right_name_gets_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = tls.make_authority(tmp_path / "authority")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority.with_name("server.pem"), authority.with_name("server.key"))
    untrusted = Delivery(again=True, why="its TLS certificate is not trusted")
    with receivers.receiver(receivers.status(204), tls=context) as ops:
        assert told(f"https://localhost:{ops.port}/") == untrusted
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        assert told(f"https://127.0.0.1:{ops.port}/") == untrusted, "a certificate of another name"
        assert not ops.requests, "nothing was sent before the certificate was seen"
        assert told(f"https://localhost:{ops.port}/") == Delivery(sent=True)
    with receivers.receiver(receivers.status(204)) as plain:
        assert told(f"https://localhost:{plain.port}/").again, "it speaks no TLS"
