"""What a person reads instead of a page: what happened and what to do, in a sentence each, never a traceback."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from loractl.common.errors import (
    AdapterNotFound,
    JobNotFound,
    LoractlError,
    SweepNotFound,
    UsageError,
)
from loractl.common.store.database import REFUSALS, outage, told_by
from loractl.common.store.schema import HEAD, mismatch

from .pages.pages import Drawn

if TYPE_CHECKING:
    from loractl.common.store.store import Store

log = logging.getLogger("loractl")


class NoSuchPage(LoractlError):
    """An address with nothing at it."""

    def __init__(self) -> None:
        super().__init__("there is no such page")


_MISSING = (NoSuchPage, JobNotFound, SweepNotFound, AdapterNotFound)


def told(error: Exception, store: Store) -> tuple[str, str | None, int]:
    """An error's message, what helps, and the HTTP status."""
    if isinstance(error, LoractlError):
        return error.sentence, error.hint, 404 if isinstance(error, _MISSING) else _status(error)
    if isinstance(error, REFUSALS):
        return _of_database(error, store)
    log.error("a page could not be drawn", exc_info=error)
    return _FAULT


_AWAY = "The database does not answer", "This page tries again by itself; loractl status says more.", 503
_FAULT = "This page could not be drawn", "That is a fault of loractl; the server's log has the reason.", 500


def _of_database(error: Exception, store: Store) -> tuple[str, str | None, int]:
    """The tables may have been upgraded or restored under the running server; else the database is down, or we have a
    bug."""
    if outage(error) is not None and "no such" not in told_by(error):  # SQLite also says so about a table
        log.warning("the database did not answer: %s", told_by(error))
        return _AWAY
    try:
        found = store.revision()
    except REFUSALS:
        log.warning("the database did not answer: %s", told_by(error))
        return _AWAY
    if found != HEAD:
        other = mismatch(found)
        return other.sentence, f"{other.hint}; then start loractl web again", 503
    if outage(error) is not None:
        return _AWAY
    log.error("the database refused what a page asked", exc_info=error)
    return _FAULT


def page_of(sentence: str, hint: str | None) -> Drawn:
    """The same as a page."""
    return Drawn(template="error.jinja", title="Not here", section="", values={"sentence": sentence, "hint": hint})


def _status(error: LoractlError) -> int:
    return 400 if isinstance(error, UsageError) else 503
