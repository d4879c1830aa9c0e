"""Who may ask: callers with the key, or only those on this machine, and never another site's page."""

from __future__ import annotations

import hmac
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from loractl.common.listener import address_of, host_name

from .openai_api import ApiError


def answered(error: ApiError) -> Response:
    """The error as a response."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class AccessControl:
    """Lets in callers who have the key. Without a key it lets in callers who address this machine by its own name.

    Otherwise a page in a browser could reach the server through a name that it points here. A browser also sends
    requests for another site's page, and a plain form needs no permission for that: such requests are recognised by
    their Origin, and by a body that is not declared as JSON. This is plain ASGI: behind Starlette's own kind of
    middleware a handler does not learn that a caller has left.
    """

    def __init__(self, app: Any, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            if (error := self._of_caller(request) or _of_page(request) or _of_content(request)) is not None:
                await answered(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _of_caller(self, request: Request) -> ApiError | None:
        if self._key is None:
            hosts = request.headers.getlist("host")
            name = host_name(hosts)
            own = name == "localhost" or ((address := address_of(name)) is not None and address.is_loopback)
            said = ", ".join(hosts)[:100]
            return None if own else ApiError(403, f"this server answers only requests to this machine, not to {said!r}")
        if request.scope["path"] == "/health":
            return None
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if hmac.compare_digest(sent, self._key.encode()):
            return None
        return ApiError(401, "this server needs an API key, and got none or a wrong one", code="invalid_api_key")


def _of_page(request: Request) -> ApiError | None:
    """A browser names the site of the page that asks; programs send no Origin."""
    host = request.headers.get("host", "").lower()
    others = [origin for origin in request.headers.getlist("origin") if _authority(origin) != host]
    if others or request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        named = f" ({others[0][:100]!r})" if others else ""
        return ApiError(403, f"a page of another site{named} asks, and this server refuses it", code="cross_site")
    return None


def _of_content(request: Request) -> ApiError | None:
    """Any site's form can send text, but not JSON without asking first."""
    if request.method not in ("POST", "PUT", "PATCH"):
        return None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return None if kind == "application/json" else ApiError(415, "the body must be JSON: content-type application/json")


def _authority(origin: str) -> str | None:
    """Host and port of an Origin, in the form of a Host header. None for anything else, like null."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
