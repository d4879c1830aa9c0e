"""What every request must pass before a page is drawn: it only reads, names this server, and shows the token."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .access import Access

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
