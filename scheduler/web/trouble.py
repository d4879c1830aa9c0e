"""What a person reads instead of a page: what happened and what to do, in a sentence each, never a traceback."""

from __future__ import annotations

import logging

from loractl.common.errors import (
    AdapterNotFound,
    JobNotFound,
    LoractlError,
    SweepNotFound,
    UsageError,
)
from loractl.common.store.database import REFUSALS, outage, told_by

from .pages.pages import Drawn

log = logging.getLogger("loractl")


class NoSuchPage(LoractlError):
    """An address with nothing at it."""

    def __init__(self) -> None:
        super().__init__("there is no such page")


_MISSING = (NoSuchPage, JobNotFound, SweepNotFound, AdapterNotFound)


def told(error: Exception) -> tuple[str, str | None, int]:
    """An error's message, what helps, and the HTTP status."""
    if isinstance(error, LoractlError):
        return error.sentence, error.hint, 404 if isinstance(error, _MISSING) else _status(error)
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


def page_of(sentence: str, hint: str | None) -> Drawn:
    """The same as a page."""
    return Drawn(template="error.jinja", title="Not here", section="", values={"sentence": sentence, "hint": hint})


def _status(error: LoractlError) -> int:
    return 400 if isinstance(error, UsageError) else 503
