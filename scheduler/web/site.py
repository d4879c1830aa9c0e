"""The application: an address for each page, drawn once for all who look at a moment, and known again by its tag."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from loractl import __version__
from loractl.common.errors import AdapterNotFound, JobNotFound, LoractlError, SweepNotFound, UsageError
from loractl.common.store.database import outage
from loractl.common.text import clean_text

from .guard import Guard
from .markup import render, static_file
from .metrics import CONTENT_TYPE, Exporter
from .pages import LARGEST, Asked, Drawn, Pages

if TYPE_CHECKING:
    from loractl.common.store.store import Store
    from loractl.scheduler.answers.lab.shelf import ReportShelf

    from .access import Access

log = logging.getLogger("loractl")

FRESH_S = 1.5
"""A page is drawn once in so long, however many look at it."""

KEPT_PAGES = 64

STATIC = {"page.css": "text/css", "refresh.js": "text/javascript", "icon.svg": "image/svg+xml"}


@dataclass(frozen=True, kw_only=True)
class KeptPage:
    """A page as it was drawn."""

    at: float
    body: bytes
    tag: str
    status: int = 200


class Site:
    """Draws pages, and keeps each for a moment."""

    def __init__(self, pages: Pages, exporter: Exporter) -> None:
        self._pages, self._exporter = pages, exporter
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, KeptPage] = OrderedDict()

    def page(self, draw: Callable[[Pages, Request], Drawn]) -> Callable[[Request], Response]:
        """The answer to a request for what `draw` draws."""

        def answer(request: Request) -> Response:
            key = f"{request.url.path}?{request.url.query}"
            with self._lock:
                kept = self._kept.get(key)
            if kept is None or time.monotonic() - kept.at > FRESH_S:
                kept = self._draw(lambda: draw(self._pages, request))
                with self._lock:
                    self._kept[key] = kept
                    self._kept.move_to_end(key)
                    while len(self._kept) > KEPT_PAGES:
                        self._kept.popitem(last=False)
            if kept.tag in request.headers.get("if-none-match", ""):
                return Response(status_code=304, headers={"etag": kept.tag})
            return Response(kept.body, kept.status, {"etag": kept.tag}, "text/html")

        return answer

    def _draw(self, draw: Callable[[], Drawn]) -> KeptPage:
        try:
            drawn, status = draw(), 200
            main = render(drawn.template, **drawn.values)
        except Exception as error:  # noqa: BLE001  a page says what happened, whatever it was; the log has the rest
            drawn, status = _told(error)
            main = render(drawn.template, **drawn.values)
        body = render("page.jinja", main=main, title=drawn.title, section=drawn.section, version=__version__)
        # the tag is that of the content: the clock in the page's head would make each page a new one
        tag = f'W/"{sha256(f"{drawn.title}{main}".encode()).hexdigest()[:24]}"'
        return KeptPage(at=time.monotonic(), body=body.encode("utf-8", "replace"), tag=tag, status=status)

    def find(self, request: Request) -> Response:
        """Where the box at the top leads: a job by its number, or the jobs of a name."""
        text = request.query_params.get("q", "").strip().removeprefix("#")
        if text.isascii() and text.isdigit() and 0 < int(text[:12]) <= LARGEST:
            return RedirectResponse(f"/jobs/{int(text)}", 303)
        return RedirectResponse(f"/jobs?{urlencode({'name': text})}" if text else "/jobs", 303)

    def log(self, request: Request) -> Response:
        """A job's whole log as text."""
        try:
            part = self._pages.log(request.path_params["number"])
            first, last = part(0)
        except LoractlError as error:
            return PlainTextResponse(f"{error.sentence}\n", 404 if isinstance(error, JobNotFound) else 503)
        return StreamingResponse(_texts(first, last, part), media_type="text/plain; charset=utf-8")

    def metrics(self, _: Request) -> Response:
        """The lab in numbers, for Prometheus."""
        return Response(self._exporter.text(), media_type=CONTENT_TYPE)


def _texts(text: str, last: int, part: Callable[[int], tuple[str, int]]) -> Iterator[str]:
    while last:
        yield clean_text(text)
        text, last = part(last)


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in STATIC:
        raise HTTPException(404)
    kept = "public, max-age=31536000, immutable" if "v" in request.query_params else "public, max-age=300"
    return Response(static_file(name), media_type=STATIC[name], headers={"cache-control": kept})


def _told(error: Exception) -> tuple[Drawn, int]:
    """An error as a page: what happened and what to do, never a traceback."""
    if isinstance(error, LoractlError):
        missing = isinstance(error, (JobNotFound, SweepNotFound, AdapterNotFound))
        status = 404 if missing else 400 if isinstance(error, UsageError) else 503
        return _error(error.sentence, error.hint), status
    if (why := outage(error)) is not None:
        log.warning("the database did not answer: %s", why)
        return _error("The database does not answer", "This page tries again by itself; loractl status says more."), 503
    log.error("a page could not be drawn", exc_info=error)
    return _error("This page could not be drawn", "That is a fault of loractl; the server's log has the reason."), 500


def _error(sentence: str, hint: str | None) -> Drawn:
    return Drawn(template="error.jinja", title="Not here", section="", values={"sentence": sentence, "hint": hint})


def make_site(store: Store, shelf: ReportShelf, access: Access) -> Any:
    """The ASGI application: every page behind the guard."""
    site = Site(Pages(store, shelf), Exporter(store))

    def numbered(draw: Callable[[Pages, Asked, int], Drawn]) -> Callable[[Request], Response]:
        return site.page(lambda pages, request: draw(pages, Asked(request.query_params), _number(request)))

    def listed(draw: Callable[[Pages, Asked], Drawn]) -> Callable[[Request], Response]:
        return site.page(lambda pages, request: draw(pages, Asked(request.query_params)))

    missing = site.page(lambda pages, request: _error("There is no such page", None))
    app = Starlette(
        routes=[
            Route("/", listed(Pages.lab)),
            Route("/jobs", listed(Pages.jobs)),
            Route("/jobs/{number:int}", numbered(Pages.job)),
            Route("/jobs/{number:int}/log", site.log),
            Route("/sweeps", listed(Pages.sweeps)),
            Route("/sweeps/{number:int}", numbered(Pages.sweep)),
            Route("/adapters", listed(Pages.adapters)),
            Route("/find", site.find),
            Route("/metrics", site.metrics),
            Route("/static/{name}", _static),
        ],
        exception_handlers={404: lambda request, error: _missing(missing, request)},
    )
    return Guard(GZipMiddleware(app, minimum_size=1000, compresslevel=5), access)


def _number(request: Request) -> int:
    number: int = request.path_params["number"]
    return number


def _missing(draw: Callable[[Request], Response], request: Request) -> Response:
    page = draw(request)
    page.status_code = 404
    return page
