"""A message by mail, over SMTP with TLS from the start, after STARTTLS, or without."""

from __future__ import annotations

import contextlib
import smtplib
import ssl
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from loractl.common.channels import Channel
from loractl.common.store.records import Delivery, Parcel

from .deadline import CONNECT_S, DEADLINE_S, broken, connected
from .message_forms import mail

_PORTS = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}


def send_mail(channel: Channel, parcel: Parcel, deadline_s: float = DEADLINE_S) -> Delivery:
    """Hand the mail to the server once. Its refusals are reported only by number."""
    parts = urlsplit(channel.url)
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    try:
        message = mail(channel, parcel)
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
                return Delivery(sent=True, why=_partly(refused, len(channel.to)))
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


def _partly(refused: Mapping[str, tuple[int, bytes]], asked: int) -> str:
    """A sentence if some recipients get none though others do; empty if all do."""
    codes = {code for code, _ in refused.values()}
    return f"SMTP {max(codes)} for {len(refused)} of its {asked} recipients" if refused else ""
