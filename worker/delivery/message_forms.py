"""A message in the form that each kind of receiver reads. A job's text is escaped for it, and is never in a header."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any
from urllib.parse import urlsplit

from loractl.common.channels import Channel, signing_key
from loractl.common.store.records import Parcel

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


def http_message(channel: Channel, parcel: Parcel, now_s: float) -> HttpMessage:
    """`now_s`: seconds since 1970; a webhook's signature is for this time."""
    return _HTTP[channel.kind](channel, parcel, now_s)


def facts(parcel: Parcel) -> dict[str, Any]:
    """What happened, for programs."""
    data = {"subject": parcel.subject, "text": parcel.text, "job_id": parcel.job_id}
    return {"id": parcel.message_id, "type": parcel.kind, "timestamp": parcel.at.isoformat(), "data": data}


def mail(channel: Channel, parcel: Parcel) -> EmailMessage:
    """As a mail. EmailMessage refuses a line break in a header, and subjects are one line already."""
    message = EmailMessage(policy=SMTP)
    message["From"], message["To"] = channel.sender, ", ".join(channel.to)
    message["Subject"] = _short(parcel.subject, SUBJECT_MOST)
    message["Message-ID"] = f"<{parcel.message_id}@loractl.invalid>"
    message["Date"] = parcel.at
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(f"{parcel.subject}\n\n{parcel.text}\n")
    return message


def _webhook(channel: Channel, parcel: Parcel, now_s: float) -> HttpMessage:
    """Standard Webhooks: the signature covers id, time and body (https://www.standardwebhooks.com)."""
    body, at = _json(facts(parcel)), str(int(now_s))
    key = signing_key(channel.secret) or b""
    signed = hmac.new(key, b".".join((parcel.message_id.encode(), at.encode(), body)), hashlib.sha256).digest()
    headers = {
        "webhook-id": parcel.message_id,
        "webhook-timestamp": at,
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
    }
    return HttpMessage(url=channel.url, body=body, headers=headers)


def _ntfy(channel: Channel, parcel: Parcel, now_s: float) -> HttpMessage:
    """Published as JSON, not by headers: https://docs.ntfy.sh/publish/#publish-as-json"""
    parts = urlsplit(channel.url)
    fine = parcel.kind in ("job.succeeded", "sweep.over")
    body = {
        "topic": parts.path.lstrip("/"),
        "title": _short(parcel.subject, SUBJECT_MOST),
        "message": parcel.text,
        "tags": ["white_check_mark" if fine else "warning"],
        "priority": 3 if fine else 4,
    }
    headers = {"Authorization": f"Bearer {channel.secret}"} if channel.secret else {}
    return HttpMessage(url=parts._replace(path="/", query="", fragment="").geturl(), body=_json(body), headers=headers)


def _slack(channel: Channel, parcel: Parcel, now_s: float) -> HttpMessage:
    text = f"{parcel.subject}\n{parcel.text}"
    for sign, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):  # else <!channel> would call everybody
        text = text.replace(sign, name)
    return HttpMessage(url=channel.url, body=_json({"text": text}))


def _discord(channel: Channel, parcel: Parcel, now_s: float) -> HttpMessage:
    content = _short(f"{parcel.subject}\n{parcel.text}", DISCORD_MOST)
    return HttpMessage(url=channel.url, body=_json({"content": content, "allowed_mentions": {"parse": []}}))


_HTTP: dict[str, Callable[[Channel, Parcel, float], HttpMessage]] = {
    "webhook": _webhook,
    "ntfy": _ntfy,
    "slack": _slack,
    "discord": _discord,
}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
