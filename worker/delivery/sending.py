"""How a message leaves: by mail, over HTTP, or to a command of the box's owner, in bounded time.

Each kind of receiver reads its own form. A job's text is escaped for it, and is never in a header or in a command's
arguments: a command gets JSON on its stdin, without a shell. Of an HTTP answer, only the status and Retry-After are
read, and no redirect is followed.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import hmac
import http.client
import json
import os
import signal
import smtplib
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from loractl.common.channels import Channel, signing_key
from loractl.common.store.records import Delivery
from loractl.common.store.tables import OutboxMessage

DISCORD_MOST = 1900
"""Characters; Discord takes 2000."""

SUBJECT_MOST = 200
"""Characters of a mail's subject and of a title."""


@dataclass(frozen=True, kw_only=True)
class HttpMessage:
    """What is posted. The address and a header may contain a secret."""

    url: str = field(repr=False)
    body: bytes
    headers: dict[str, str] = field(default_factory=dict, repr=False)


def http_message(channel: Channel, due: OutboxMessage, now_s: float) -> HttpMessage:
    """`now_s`: seconds since 1970; a webhook's signature is for this time."""
    return _HTTP[channel.kind](channel, due, now_s)


def facts(due: OutboxMessage) -> dict[str, Any]:
    """What happened, for programs."""
    data = {"subject": due.subject, "text": due.text, "job_id": due.job_id}
    return {"id": due.message_id, "type": due.kind, "timestamp": due.at.isoformat(), "data": data}


def mail(channel: Channel, due: OutboxMessage) -> EmailMessage:
    """As a mail. EmailMessage refuses a line break in a header, and subjects are one line already."""
    message = EmailMessage(policy=SMTP)
    message["From"], message["To"] = channel.sender, ", ".join(channel.to)
    message["Subject"] = _short(due.subject, SUBJECT_MOST)
    message["Message-ID"] = f"<{due.message_id}@loractl.invalid>"
    message["Date"] = due.at
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(f"{due.subject}\n\n{due.text}\n")
    return message


def _webhook(channel: Channel, due: OutboxMessage, now_s: float) -> HttpMessage:
    """Standard Webhooks: the signature covers id, time and body (https://www.standardwebhooks.com)."""
    body, at = _json(facts(due)), str(int(now_s))
    key = signing_key(channel.secret) or b""
    signed = hmac.new(key, b".".join((due.message_id.encode(), at.encode(), body)), hashlib.sha256).digest()
    headers = {
        "webhook-id": due.message_id,
        "webhook-timestamp": at,
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
    }
    return HttpMessage(url=channel.url, body=body, headers=headers)


def _ntfy(channel: Channel, due: OutboxMessage, now_s: float) -> HttpMessage:
    """Published as JSON, not by headers: https://docs.ntfy.sh/publish/#publish-as-json"""
    parts = urlsplit(channel.url)
    fine = due.kind in ("job.succeeded", "sweep.over")
    body = {
        "topic": parts.path.lstrip("/"),
        "title": _short(due.subject, SUBJECT_MOST),
        "message": due.text,
        "tags": ["white_check_mark" if fine else "warning"],
        "priority": 3 if fine else 4,
    }
    headers = {"Authorization": f"Bearer {channel.secret}"} if channel.secret else {}
    return HttpMessage(url=parts._replace(path="/", query="", fragment="").geturl(), body=_json(body), headers=headers)


def _slack(channel: Channel, due: OutboxMessage, now_s: float) -> HttpMessage:
    text = f"{due.subject}\n{due.text}"
    for sign, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):  # else <!channel> would call everybody
        text = text.replace(sign, name)
    return HttpMessage(url=channel.url, body=_json({"text": text}))


def _discord(channel: Channel, due: OutboxMessage, now_s: float) -> HttpMessage:
    content = _short(f"{due.subject}\n{due.text}", DISCORD_MOST)
    return HttpMessage(url=channel.url, body=_json({"content": content, "allowed_mentions": {"parse": []}}))


_HTTP: dict[str, Callable[[Channel, OutboxMessage, float], HttpMessage]] = {
    "webhook": _webhook,
    "ntfy": _ntfy,
    "slack": _slack,
    "discord": _discord,
}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


CONNECT_S = 5.0
"""Seconds for each address of a receiver, and for each silence."""

DEADLINE_S = 15.0
"""Seconds for a whole exchange, including the connection; well within a message's lease."""


@contextlib.contextmanager
def connected(host: str, port: int, deadline_s: float = DEADLINE_S) -> Iterator[socket.socket]:
    """A connection that is shut down when its time runs out: a read then ends at once.

    Raises OSError; TimeoutError if the time ran out, even after part of an answer.
    """
    with socket.create_connection((host, port), timeout=min(CONNECT_S, deadline_s)) as connection:
        over = threading.Event()
        file = connection.dup()  # wrapping in TLS takes the socket away from its first object

        def end() -> None:
            over.set()
            with contextlib.suppress(OSError):
                file.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(deadline_s, end)
        timer.daemon = True
        timer.start()
        try:
            yield connection
        finally:
            timer.cancel()
            file.close()
            if over.is_set():
                raise TimeoutError


def broken(error: Exception) -> Delivery:
    """A failed exchange in our own words: an error's text may contain an address, or the receiver's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = "its TLS certificate is not trusted"
    elif isinstance(error, ssl.SSLError):
        why = "TLS failed"
    elif isinstance(error, TimeoutError):
        why = "it does not answer in time"
    elif isinstance(error, ConnectionRefusedError):
        why = "the connection is refused"
    elif isinstance(error, socket.gaierror):
        why = "its name is not found"
    else:
        why = "the connection broke"
    return Delivery(again=True, why=why)


_PORTS = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}


def send_mail(channel: Channel, due: OutboxMessage, deadline_s: float = DEADLINE_S) -> Delivery:
    """Hand the mail to the server once. Its refusals are reported only by number."""
    parts = urlsplit(channel.url)
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    try:
        message = mail(channel, due)
    except ValueError:
        return Delivery(why="a mail can't have these headers: look at the channel's from and to")
    try:
        with connected(host, port, deadline_s) as connection:
            trusted = ssl.create_default_context()
            if parts.scheme == "smtps":
                connection = trusted.wrap_socket(connection, server_hostname=host)
            client = smtplib.SMTP(timeout=CONNECT_S, local_hostname="[127.0.0.1]")
            client.sock = connection
            client._host = host  # type: ignore[attr-defined]  # what STARTTLS compares the certificate with
            with contextlib.closing(client):
                code, _ = client.getreply()
                if code != 220:
                    raise smtplib.SMTPConnectError(code, b"")
                if parts.scheme == "smtp+starttls":
                    client.starttls(context=trusted)
                if parts.username is not None:
                    client.login(unquote(parts.username), unquote(parts.password or ""))
                refused = client.send_message(message, channel.sender, list(channel.to))
                codes = {code for code, _ in refused.values()}  # some recipients get none though others do
                partly = f"SMTP {max(codes)} for {len(refused)} of its {len(channel.to)} recipients" if refused else ""
                return Delivery(sent=True, why=partly)
    except smtplib.SMTPResponseException as error:
        return Delivery(again=error.smtp_code < 500, why=f"SMTP {error.smtp_code}")
    except smtplib.SMTPRecipientsRefused as error:
        codes = {code for code, _ in error.recipients.values()}
        return Delivery(again=all(code < 500 for code in codes), why=f"SMTP {max(codes)} for its recipients")
    except UnicodeError:
        return Delivery(why="a login over SMTP has plain characters alone: look at the channel's url")
    except smtplib.SMTPServerDisconnected:
        return Delivery(again=True, why="the connection broke")
    except smtplib.SMTPException:
        return Delivery(why="the server lacks what the channel asks for: STARTTLS or a login")
    except OSError as error:
        return broken(error)


_ENVIRONMENT = ("PATH", "HOME", "LANG", "TZ")
"""What it gets from the node's environment, which contains passwords."""


def run_program(channel: Channel, due: OutboxMessage, deadline_s: float = DEADLINE_S) -> Delivery:
    """Run it once; exit status 0 means that the message is delivered. At the deadline it is killed with its
    children."""
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    nothing = subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            channel.command,
            stdin=subprocess.PIPE,
            stdout=nothing,
            stderr=nothing,
            env=environment,
            start_new_session=True,
        )
    except OSError:
        return Delivery(again=True, why="the command can't be started")
    try:
        process.communicate(json.dumps(facts(due)).encode(), timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return Delivery(again=True, why=f"the command did not end within {deadline_s:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    status = process.returncode
    return Delivery(
        sent=status == 0, again=status != 0, why=f"the command ended with status {status}" if status else ""
    )


_AGAIN = frozenset({408, 425, 429})
"""Temporary refusals, besides every status from 500 on."""

_MOST_RETRY_DIGITS = 9


def post(message: HttpMessage, deadline_s: float = DEADLINE_S) -> Delivery:
    """Post once. The environment's proxies are not used. The receiver's answer is neither kept nor shown."""
    parts = urlsplit(message.url)
    secure, host = parts.scheme == "https", parts.hostname or ""
    try:
        with connected(host, parts.port or (443 if secure else 80), deadline_s) as plain:
            if not secure:
                return _exchange(plain, message)
            with ssl.create_default_context().wrap_socket(plain, server_hostname=host) as wrapped:
                return _exchange(wrapped, message)
    except OSError as error:
        return broken(error)
    except (http.client.HTTPException, ValueError):
        return Delivery(again=True, why="its answer is not HTTP")


def _exchange(connection: socket.socket, message: HttpMessage) -> Delivery:
    parts = urlsplit(message.url)
    http_connection = http.client.HTTPConnection(parts.netloc.rpartition("@")[2])
    http_connection.sock = connection
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    headers = {"Content-Type": "application/json", "User-Agent": "loractl", "Connection": "close", **message.headers}
    http_connection.request("POST", target, message.body, headers)
    answer = http_connection.getresponse()  # the body is never read
    status = answer.status
    if 200 <= status < 300:
        return Delivery(sent=True)
    if 300 <= status < 400:
        return Delivery(why=f"HTTP {status}: it redirects, and a message with its secret is not sent elsewhere")
    again = status >= 500 or status in _AGAIN
    after_s = _seconds(answer.getheader("Retry-After")) if again else None
    return Delivery(again=again, why=f"HTTP {status}", after_s=after_s)


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After, which is a number or a date (RFC 9110, 10.2.3); None if it is neither."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:_MOST_RETRY_DIGITS])
    try:
        at = parsedate_to_datetime(text)
        return max(0.0, (at - dt.datetime.now(at.tzinfo)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
