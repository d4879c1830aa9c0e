"""Text that is safe to show and to store: nothing in it steers a terminal, and a database can hold all of it."""

from __future__ import annotations

from collections.abc import Iterable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def clean_text(text: str, keep: str = "\n\t") -> str:
    """Text of several lines without control characters, except those in `keep`: others could steer a terminal."""
    return "".join(c if c.isprintable() or c in keep else REPLACEMENT for c in text)


def clean_line(text: str) -> str:
    """What a person or a program wrote as one line without control characters."""
    return clean_text(" ".join(text.splitlines()), keep="")


def storable(text: str) -> str:
    """The text without what PostgreSQL or UTF-8 can't hold: zero bytes and lone surrogates."""
    return text.replace("\0", REPLACEMENT).encode("utf-8", "replace").decode("utf-8")


def number(value: float | None, digits: int) -> str:
    """The value with `digits` decimals, "–" when unknown."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A change as "+0.42" or "−0.42" with a real minus sign, "–" when unknown."""
    return "–" if value is None else minus(f"{value:+.{digits}f}")


def minus(text: str) -> str:
    """A formatted number with a real minus sign."""
    return text.replace("-", "\N{MINUS SIGN}")


def slip_of(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant; None if none is so close: seed is no slip of deepspeed."""
    import difflib

    names = list(known)
    swapped = [name for name in names if sorted(name) == sorted(word)]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.75) or swapped
    return close[0] if close else None
