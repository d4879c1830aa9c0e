"""One POST of a message: in bounded time, without redirects, and reading only the status and Retry-After."""

from __future__ import annotations

import datetime as dt
import http.client
import socket
import ssl
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from loractl.common.store.records import Delivery

from .deadline import DEADLINE_S, broken, connected
from .message_forms import HttpMessage

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
    return _judged(answer.status, answer.getheader("Retry-After"))


def _judged(status: int, retry_after: str | None) -> Delivery:
    if 200 <= status < 300:
        return Delivery(sent=True)
    if 300 <= status < 400:
        return Delivery(why=f"HTTP {status}: it redirects, and a message with its secret is not sent elsewhere")
    again = status >= 500 or status in _AGAIN
    return Delivery(again=again, why=f"HTTP {status}", after_s=_seconds(retry_after) if again else None)


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
