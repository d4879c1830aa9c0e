"""The application: an address for each page, drawn once for all viewers at a moment, and recognised by its ETag. What a
person reads in place of a page is what happened and what to do, in a sentence each, never a traceback."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from loractl import __version__
from loractl.common.errors import AdapterNotFound, JobNotFound, LoractlError, SweepNotFound, UsageError, WrongState
from loractl.common.store.database import REFUSALS, outage, told_by
from loractl.common.store.store import Store
from loractl.common.text import clean_text
from loractl.common.units import LAST_NUMBER

from .guard import Access, Guard
from .metrics import CONTENT_TYPE, Exporter
from .pages.markup import render, static_file
from .pages.pages import PARAMETERS, Asked, Drawn, Pages, number_of
from .pages.shelf import ReportShelf

log = logging.getLogger("loractl")

FRESH_S = 1.5
"""A page is drawn once in this time, however many look at it."""

KEPT_PAGES = 64

STATIC = {"page.css": "text/css", "refresh.js": "text/javascript", "icon.svg": "image/svg+xml"}


@dataclass(frozen=True, kw_only=True)
class KeptPage:
    """A drawn page."""

    at: float
    body: bytes
    tag: str
    status: int = 200


class Site:
    """Draws pages, and keeps each for a moment."""

    def __init__(self, pages: Pages, exporter: Exporter) -> None:
        self._pages, self._exporter = pages, exporter
        self._lock = threading.Lock()
        self._drawing: dict[str, threading.Lock] = {}
        self._kept: OrderedDict[str, KeptPage] = OrderedDict()

    def page(self, draw: Callable[[Pages, Request], Drawn]) -> Callable[[Request], Response]:
        """The answer to a request for what `draw` draws."""

        def answer(request: Request) -> Response:
            kept = self._page(_key(request), lambda: self._draw(lambda: draw(self._pages, request)))
            if kept.tag in request.headers.get("if-none-match", "") and kept.status == 200:
                return Response(status_code=304, headers={"etag": kept.tag})
            return Response(kept.body, kept.status, {"etag": kept.tag}, "text/html")

        return answer

    def _page(self, key: str, draw: Callable[[], KeptPage]) -> KeptPage:
        """The page drawn a moment ago. A request during the drawing waits for it."""
        with self._lock:
            if (kept := self._fresh(key)) is not None:
                return kept
            drawing = self._drawing.setdefault(key, threading.Lock())
        with drawing:
            with self._lock:
                if (kept := self._fresh(key)) is not None:
                    return kept
            kept = draw()
            with self._lock:
                self._kept[key] = kept
                self._kept.move_to_end(key)
                self._drawing.pop(key, None)
                while len(self._kept) > KEPT_PAGES:
                    self._kept.popitem(last=False)
        return kept

    def _fresh(self, key: str) -> KeptPage | None:
        kept = self._kept.get(key)
        return None if kept is None or time.monotonic() - kept.at > FRESH_S else kept

    def _draw(self, draw: Callable[[], Drawn]) -> KeptPage:
        try:
            drawn, status = draw(), 200
            main = render(drawn.template, **drawn.values)
        except Exception as error:  # noqa: BLE001  a page says what happened, whatever it was; the log has the rest
            sentence, hint, status = _told(error)
            told = {"sentence": sentence, "hint": hint}
            drawn = Drawn(template="error.jinja", title="Not here", section="", values=told)
            main = render(drawn.template, **drawn.values)
        body = render("page.jinja", main=main, title=drawn.title, section=drawn.section, version=__version__)
        # the tag depends only on the content: the clock in the page's head would make each page new
        tag = f'W/"{sha256(f"{drawn.title}{main}".encode("utf-8", "replace")).hexdigest()[:24]}"'
        return KeptPage(at=time.monotonic(), body=body.encode("utf-8", "replace"), tag=tag, status=status)

    def find(self, request: Request) -> Response:
        """Where the search box at the top leads: a job by its number, or the jobs of a name."""
        text = request.query_params.get("q", "").strip().removeprefix("#")
        if (number := number_of(text)) is not None:
            return RedirectResponse(f"/jobs/{number}", 303)
        return RedirectResponse(f"/jobs?{urlencode({'name': text})}" if text else "/jobs", 303)

    def log(self, request: Request) -> Response:
        """A job's whole log as text."""
        try:
            part = self._pages.log(_number(request))
            first, last = part(0)
        except Exception as error:  # noqa: BLE001  as for a page
            return self._plain(error)
        return StreamingResponse(_texts(first, last, part), media_type="text/plain; charset=utf-8")

    def metrics(self, _: Request) -> Response:
        """The lab in numbers, for Prometheus."""
        try:
            return Response(self._exporter.text(), media_type=CONTENT_TYPE)
        except Exception as error:  # noqa: BLE001  as for a page
            return self._plain(error)

    def _plain(self, error: Exception) -> Response:
        sentence, _, status = _told(error)
        return PlainTextResponse(f"{sentence}\n", status)


def _key(request: Request) -> str:
    """What distinguishes pages. Unknown parameters do not."""
    given = request.query_params
    return "\n".join((request.scope["path"], *(f"{key}={given[key]}" for key in PARAMETERS if key in given)))


def _texts(text: str, last: int, part: Callable[[int], tuple[str, int]]) -> Iterator[str]:
    while last:
        yield clean_text(text)
        try:
            text, last = part(last)
        except (*REFUSALS, LoractlError):
            yield "\n(the database does not answer: the log continues there)\n"
            return


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in STATIC:
        raise HTTPException(404)
    kept = "public, max-age=31536000, immutable" if "v" in request.query_params else "public, max-age=300"
    return Response(static_file(name), media_type=STATIC[name], headers={"cache-control": kept})


def make_site(store: Store, shelf: ReportShelf, access: Access) -> Any:
    """The ASGI application: every page behind the guard."""
    site = Site(Pages(store, shelf), Exporter(store))

    def numbered(draw: Callable[[Pages, Asked, int], Drawn]) -> Callable[[Request], Response]:
        return site.page(lambda pages, request: draw(pages, Asked(request.query_params), _number(request)))

    def listed(draw: Callable[[Pages, Asked], Drawn]) -> Callable[[Request], Response]:
        return site.page(lambda pages, request: draw(pages, Asked(request.query_params)))

    app = Starlette(
        routes=[
            Route("/", listed(Pages.lab)),
            Route("/jobs", listed(Pages.jobs)),
            Route("/jobs/{number:int}", numbered(Pages.job)),
            Route("/jobs/{number:int}/log", site.log),
            Route("/sweeps", listed(Pages.sweeps)),
            Route("/sweeps/{number:int}", numbered(Pages.sweep)),
            Route("/adapters", listed(Pages.adapters)),
            Route("/usage", listed(Pages.usage)),
            Route("/find", site.find),
            Route("/metrics", site.metrics),
            Route("/static/{name}", _static),
        ],
        exception_handlers={404: lambda request, error: site.page(_no_page)(request)},
    )
    return Guard(GZipMiddleware(app, minimum_size=1000, compresslevel=5), access)


def _number(request: Request) -> int:
    number: int = request.path_params["number"]
    if not 0 < number <= LAST_NUMBER:
        raise NoSuchPage
    return number


def _no_page(pages: Pages, request: Request) -> Drawn:
    raise NoSuchPage


class NoSuchPage(LoractlError):
    """An address with nothing at it."""

    def __init__(self) -> None:
        super().__init__("there is no such page")


_MISSING = (NoSuchPage, JobNotFound, SweepNotFound, AdapterNotFound, WrongState)


def _told(error: Exception) -> tuple[str, str | None, int]:
    """An error's message, what helps, and the HTTP status."""
    if isinstance(error, LoractlError):
        status = 404 if isinstance(error, _MISSING) else 400 if isinstance(error, UsageError) else 503
        return error.sentence, error.hint, status
    if isinstance(error, REFUSALS):
        return _of_database(error)
    log.error("a page could not be drawn", exc_info=error)
    return _FAULT


_AWAY = "The database does not answer", "This page tries again by itself; loractl status says more.", 503
_FAULT = "This page could not be drawn", "That is a fault of loractl; the server's log has the reason.", 500


def _of_database(error: Exception) -> tuple[str, str | None, int]:
    """The database is down, or we have a bug."""
    if outage(error) is None:
        log.error("the database refused what a page asked", exc_info=error)
        return _FAULT
    log.warning("the database did not answer: %s", told_by(error))
    return _AWAY
