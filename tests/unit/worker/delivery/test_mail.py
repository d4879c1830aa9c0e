"""Mail to a real SMTP server on loopback."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from loractl.common.channels import Channel
from loractl.common.store.records import Delivery
from loractl.worker.delivery.messenger import deliver

from .... import receivers, tls
from ....services import free_port
from .due import due


class Mailbox:
    """A handler of aiosmtpd that keeps what it gets, or refuses it."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.envelopes: list[Envelope] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        if self.refusal:
            return self.refusal
        self.envelopes.append(envelope)
        return "250 kept"


@contextlib.contextmanager
def mail_server(mailbox: Mailbox, **options: Any) -> Iterator[int]:
    controller = Controller(mailbox, hostname="127.0.0.1", port=free_port(), **options)
    controller.start()
    try:
        yield controller.port
    finally:
        controller.stop()


def told(url: str) -> Delivery:
    to = ("ada@lab.example", "boss@lab.example")
    return deliver(Channel(name="mail", kind="mail", url=url, sender="loractl@lab.example", to=to), due(), 2.0)


def test_a_mail_arrives_with_its_result_in_the_subject() -> None:
    mailbox = Mailbox()
    with mail_server(mailbox) as port:
        assert told(f"smtp://127.0.0.1:{port}") == Delivery(sent=True)
    (envelope,) = mailbox.envelopes
    assert envelope.rcpt_tos == ["ada@lab.example", "boss@lab.example"]
    assert isinstance(envelope.content, bytes)
    message = message_from_bytes(envelope.content)
    assert message["Subject"] == "triage-r32: better, loss 4.49 -> 0.25"
    assert message["Message-ID"] == "<msg_7@loractl.invalid>"


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ("451 ANSWER, later", Delivery(again=True, why="SMTP 451")),
        ("554 ANSWER, never", Delivery(why="SMTP 554")),
    ],
)
def test_a_refusal_is_reported_only_by_its_number(refusal: str, expected: Delivery) -> None:
    with mail_server(Mailbox(refusal)) as port:
        assert told(f"smtp://127.0.0.1:{port}") == expected


class Choosy(Mailbox):
    """It knows one of the two recipients."""

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address.startswith("boss"):
            return "550 ANSWER, nobody"
        envelope.rcpt_tos.append(address)
        return "250 known"


def test_a_refused_recipient_is_reported_though_others_get_the_mail() -> None:
    mailbox = Choosy()
    with mail_server(mailbox) as port:
        expected = Delivery(sent=True, why="SMTP 550 for 1 of its 2 recipients")
        assert told(f"smtp://127.0.0.1:{port}") == expected
    assert len(mailbox.envelopes) == 1


def test_a_server_that_says_nothing_or_hangs_up_is_tried_again() -> None:
    with receivers.receiver(receivers.hang) as silent:
        assert told(f"smtp://127.0.0.1:{silent.port}").again
    assert told(f"smtp://127.0.0.1:{free_port()}") == Delivery(again=True, why="the connection is refused")


def test_a_password_is_sent_only_to_a_trusted_server_after_starttls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = tls.make_authority(tmp_path / "authority")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority.with_name("server.pem"), authority.with_name("server.key"))
    logins: list[object] = []

    def authenticate(server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: object) -> AuthResult:
        logins.append(data)
        return AuthResult(success=data == LoginPassword(b"ada", b"p/w"))

    options = {"tls_context": context, "authenticator": authenticate, "auth_required": True}
    mailbox = Mailbox()
    with mail_server(mailbox, **options) as port:
        url = f"smtp+starttls://ada:p%2Fw@localhost:{port}"
        assert told(url) == Delivery(again=True, why="its TLS certificate is not trusted")
        assert logins == []
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        assert told(url) == Delivery(sent=True)
        assert told(url.replace("p%2Fw", "wrong")).sent is False
        assert "plain characters" in told(url.replace("p%2Fw", "p%C3%A4ss")).why
    with mail_server(Mailbox()) as port:
        assert told(f"smtp+starttls://localhost:{port}").sent is False, "it offers no STARTTLS"
    assert len(mailbox.envelopes) == 1
