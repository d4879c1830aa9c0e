"""Who may look: every request only reads, calls this server by a name of its own, and shows its token if it has one."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loractl.common.errors import LoractlError, UsageError
from loractl.common.listener import address_of, host_name
from loractl.common.settings import make_private

TOKEN_BYTES = 32
TOKEN_FILE = "web-token"  # noqa: S105  a file's name


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a request must show."""

    token: str | None  # None: nothing, the server listens on this machine's own address
    names: frozenset[str]  # host names by which it may be called, besides addresses

    def knows(self, hosts: Sequence[str]) -> bool:
        """Whether the Host headers name us. An address is no name that a stranger's DNS could point here."""
        name = host_name(hosts)
        address = address_of(name)
        if address is None:
            return name in self.names
        return address.is_loopback if self.token is None else True

    def admits(self, token: str) -> bool:
        """Whether it is the token. Takes the same time for every wrong token."""
        return self.token is None or hmac.compare_digest(token.encode(), self.token.encode())

    def admits_cookie(self, value: str) -> bool:
        """Whether it is the cookie value for the token."""
        return self.token is None or hmac.compare_digest(value.encode(), self.cookie.encode())

    @property
    def cookie(self) -> str:
        """The value of the browser's cookie, which does not reveal the token."""
        return sha256(f"loractl web cookie {self.token}".encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address. Raises UsageError for anything else."""
    if host == "localhost":
        return True
    address = address_of(host)
    if address is None:
        raise UsageError(f"--host {host!r} is not an address", "like 127.0.0.1, or 0.0.0.0 for all of this machine")
    return address.is_loopback


def access_to(host: str, home: Path, more_names: Iterable[str], *, always: bool) -> Access:
    """What a server on this address asks for: nothing on a loopback address, unless `always`; else the home's token."""
    names = {"localhost", *(name.lower().rstrip(".") for name in more_names)}
    if is_loopback(host) and not always:
        return Access(token=None, names=frozenset(names))
    own = socket.gethostname().lower()
    return Access(token=home_token(home), names=frozenset({*names, own, own.partition(".")[0]}))


def home_token(home: Path) -> str:
    """The token of a home, drawn on first use. Raises LoractlError."""
    path = home / TOKEN_FILE
    try:
        make_private(home)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(TOKEN_BYTES) + "\n")
    except FileExistsError:
        pass
    except OSError as error:
        raise LoractlError(f"{path} can't be made: {error.strerror}", "set LORACTL_HOME") from error
    if path.stat().st_mode & 0o077:
        raise LoractlError(f"{path} holds the token, and others can read it", f"delete it: a new one is drawn; {path}")
    token = path.read_text("utf-8").strip()
    if len(token) < TOKEN_BYTES:
        raise LoractlError(f"{path} holds no token", "delete it: a new one is drawn")
    return token


COOKIE = "loractl_web"

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
"""Nothing inline, nothing from elsewhere, nothing framed; a link out reveals nothing about its page."""

LONGEST_URL = 4096


class Guard:
    """Plain ASGI around the pages: methods that only read, a Host of ours, the token if there is one."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "private, no-cache")
            await send(message)

        answer = self._answer(Request(scope))
        await (self._app if answer is None else answer)(scope, receive, send_guarded)

    def _answer(self, request: Request) -> Response | None:
        """The answer instead of a page; None: the page."""
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("this server is read-only\n", 405, {"allow": "GET, HEAD"})
        if len(request.scope.get("raw_path") or b"") + len(request.scope["query_string"]) > LONGEST_URL:
            return PlainTextResponse("this address is too long\n", 414)
        if not self._access.knows(request.headers.getlist("host")):
            return PlainTextResponse("this server has another name; see loractl web --allow-host\n", 421)
        if self._access.token is None or request.scope["path"].startswith("/static/"):
            return None  # styles are no secret, and the page that asks for the token needs them
        return self._of_token(request)

    def _of_token(self, request: Request) -> Response | None:
        given = request.query_params.get("token")
        if given is not None:
            return self._signed_in(request) if self._access.admits(given) else _refused()
        sent = request.headers.get("authorization", "")
        if sent.startswith("Bearer "):
            return None if self._access.admits(sent.removeprefix("Bearer ")) else _refused()
        if self._access.admits_cookie(request.cookies.get(COOKIE, "")):
            return None
        if request.headers.get("sec-fetch-site") == "cross-site":
            return _once_more(_without_token(request))  # a browser sends a strict cookie only from our own page
        return _refused()

    def _signed_in(self, request: Request) -> Response:
        """The cookie, and the same address without the token, which must not stay in histories."""
        target = _without_token(request)
        elsewhere = request.headers.get("sec-fetch-site") == "cross-site"
        answer = _once_more(target) if elsewhere else RedirectResponse(target, 303)
        secure = request.scope["scheme"] == "https"
        answer.set_cookie(COOKIE, self._access.cookie, httponly=True, samesite="strict", secure=secure)
        answer.headers["cache-control"] = "no-store"
        return answer


def _without_token(request: Request) -> str:
    given = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    query = urlencode([(key, value) for key, value in given if key != "token"])
    path = "/" + quote(request.scope["path"].lstrip("/"))  # two slashes, or a backslash, would name another server
    return f"{path}?{query}" if query else path


def _refused() -> Response:
    text = (
        "<h1>This page needs its token</h1><p class=lede>Open the address that <code>loractl web</code> printed when it"
        " started, or add <code>?token=...</code> with the line of its file <code>web-token</code>.</p>"
    )
    return HTMLResponse(_bare("loractl", text), 401, {"www-authenticate": "Bearer", "cache-control": "no-store"})


def _once_more(target: str) -> Response:
    """Our own page that redirects to the target at once."""
    address = escape(target, quote=True)
    head = f'<meta http-equiv="refresh" content="0;url={address}">'
    return HTMLResponse(_bare("loractl", f'<p><a href="{address}">Go on</a></p>', head), 200)


def _bare(title: str, body: str, head: str = "") -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>{head}'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="stylesheet" href="/static/page.css"><main>{body}</main></html>'
    )
