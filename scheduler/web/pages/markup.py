"""Templates filled with answers: all output is escaped, and has no control characters."""

from __future__ import annotations

import datetime as dt
import functools
import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from loractl.common.text import clean_text, number, signed
from loractl.common.units import GIB, amount, clock, duration, gib, thousands
from loractl.scheduler.wait.gangs import in_words

from . import drawing

OWNER_COLOURS = 8


@functools.cache
def static_file(name: str) -> bytes:
    """A file that pages ask for: style, script, icon."""
    return (files(__package__) / name).read_bytes()


@functools.cache
def static_url(name: str) -> str:
    """Its address; other content has another address, so browsers may cache it."""
    return f"/static/{name}?v={sha256(static_file(name)).hexdigest()[:12]}"


def render(template: str, **values: Any) -> Markup:
    """The template filled with the values."""
    return Markup(_environment().get_template(template).render(**values))  # noqa: S704  made by autoescaping templates


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(lambda name: (files(__package__) / name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters.update(_FILTERS)
    environment.globals.update(static_url=static_url, GIB=GIB, drawing=drawing)
    return environment


def _finalize(value: Any) -> Any:
    """Printed text, without control characters: in a page they could reverse the reading direction."""
    if isinstance(value, str) and not isinstance(value, Markup) and not value.isprintable():
        return clean_text(value)
    return "" if value is None else value


def _setting(value: Any) -> str:
    """A value of a job file on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _model(name: str) -> str:
    """The last part of a model's name or folder."""
    return name.rstrip("/").rpartition("/")[2] or name


def _method(name: str | None) -> str:
    return {"lora": "LoRA", "qlora": "QLoRA"}.get(name or "", name or "")


_NONE = Markup('<span class="none">–</span>')


def _or_none(text: str) -> str:
    """A value for a cell; a dash for a missing one is marked, and left out on a narrow screen."""
    return _NONE if text == "–" else text


def _later(now: dt.datetime, seconds: float) -> dt.datetime:
    return now + dt.timedelta(seconds=seconds)


def _hours(hours: float, digits: int = 1) -> str:
    """Hours for a column: 0.3, 1 045.2."""
    return f"{hours:,.{digits}f}".replace(",", " ")


def _arrows(text: str) -> str:
    """A stored sentence with an arrow in place of a terminal's."""
    return text.replace(" -> ", " → ")


def _counted(number: int, thing: str) -> str:
    """1 step, 1 584 steps."""
    return f"{thousands(number)} {thing}{'' if number == 1 else 's'}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * min(1.0, max(0.0, share)):.0f} %"


def _upper_first(text: str) -> str:
    """A sentence's first letter, unless it begins with a command, a file, a card or a key."""
    first = text.partition(" ")[0].rstrip(",:;.").replace("-", "")
    return text[:1].upper() + text[1:] if first.isalpha() and first != "loractl" else text


def _owner(name: str, owners: Mapping[str, int]) -> int:
    """The number of an owner's colour, from 1."""
    return owners.get(name, sum(name.encode()) % OWNER_COLOURS) % OWNER_COLOURS + 1


def _program(process: Mapping[str, Any]) -> str:
    """Another person's program in a few words."""
    name, user = process.get("name") or f"pid {process.get('pid', '?')}", process.get("user")
    return f"{user} · {name}" if user else str(name)


_FILTERS: dict[str, Callable[..., Any]] = {
    "amount": amount, "arrows": _arrows, "clock": clock, "counted": _counted, "duration": duration, "gib": gib,
    "hours": _hours, "in_words": in_words, "later": _later, "method": _method, "model": _model, "number": number,
    "or_none": _or_none, "owner": _owner, "percent": _percent, "program": _program, "setting": _setting,
    "signed": signed, "thousands": thousands, "upper_first": _upper_first,
}  # fmt: skip
