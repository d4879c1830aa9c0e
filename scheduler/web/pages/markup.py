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

from loractl.common.text import clean_text, in_words, number, signed
from loractl.common.units import GIB, amount, clock, duration, gib, thousands

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


_NONE = Markup('<span class="none">–</span>')
"""A dash for a missing value: left out on a narrow screen."""


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
    "amount": amount, "clock": clock, "duration": duration, "gib": gib, "in_words": in_words, "number": number,
    "owner": _owner, "program": _program, "signed": signed, "thousands": thousands, "upper_first": _upper_first,
    "arrows": lambda text: text.replace(" -> ", " → "),  # a stored sentence has a terminal's
    "counted": lambda number, thing: f"{thousands(number)} {thing}{'' if number == 1 else 's'}",  # 1 step, 1 584 steps
    "hours": lambda hours, digits=1: f"{hours:,.{digits}f}".replace(",", " "),  # 0.3, 1 045.2
    "later": lambda now, seconds: now + dt.timedelta(seconds=seconds),
    "method": lambda name: {"lora": "LoRA", "qlora": "QLoRA"}.get(name or "", name or ""),
    "model": lambda name: name.rstrip("/").rpartition("/")[2] or name,  # the last part of its name or folder
    "or_none": lambda text: _NONE if text == "–" else text,
    "percent": lambda share: "" if share is None else f"{100 * min(1.0, max(0.0, share)):.0f} %",
    "setting": lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
}  # fmt: skip
