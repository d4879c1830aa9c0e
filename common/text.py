"""Text that is safe to show and to store: nothing in it steers a terminal, a database can hold all of it, and no URL in
it shows a password; and how numbers, cards and jobs are written in a sentence or a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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


# No token of a cloud is longer: where no @ follows, each address in a long line of a log is looked at in turn.
_SECRETS = (
    (
        # not the example's, and not a port, which stands behind a host and before a slash, a quote or the end
        re.compile(r"(:/{1,2}[^\s:/]*):(?!PASSWORD@|(?<!/:)\d{1,5}(?:[/?#\s\"]|$))\S{0,4096}@"),
        r"\1:***@",
    ),
    (re.compile(r"(https?:/{1,2})[^\s:/@]+@"), r"\1***@"),  # a token
    (re.compile(r"([?&][\w-]*(?:password|token|secret|signature)=)[^&\s]*[^&\s:]", re.IGNORECASE), r"\1***"),
)


def without_passwords(text: str) -> str:
    """The text with the passwords and tokens of all URLs in it as ***."""
    if ":/" in text:  # a path has one slash
        for secret, shown in _SECRETS:
            text = secret.sub(shown, text)
    return text


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


def in_words(cards: Sequence[str]) -> str:
    """Cards, or jobs, for a sentence, like "heron:0, heron:1 and heron:2"."""
    *first, last = cards
    return f"{', '.join(first)} and {last}" if first else last


def in_short(cards: Sequence[str]) -> str:
    """Cards for a table: several of one box like "heron 0, 1", one by its name."""
    boxes = {card.rpartition(":")[0] for card in cards}
    if len(cards) < 2 or len(boxes) > 1:
        return ", ".join(cards)
    indexes = sorted((card.rpartition(":")[2] for card in cards), key=lambda index: (len(index), index))
    return f"{boxes.pop()} {', '.join(indexes)}"


def numbers(jobs: Sequence[int]) -> str:
    """Jobs for a sentence, like "job 3", "jobs 3 and 1", "jobs 3, 1 and 4 more"."""
    more = f", {jobs[1]} and {len(jobs) - 2} more" if len(jobs) > 2 else f" and {jobs[1]}" if len(jobs) > 1 else ""
    return f"{'job' if len(jobs) == 1 else 'jobs'} {jobs[0]}{more}"


def when_they_end(jobs: Sequence[int]) -> str:
    """The jobs that must end, like "jobs 3 and 1 end"."""
    return f"{numbers(jobs)} {'ends' if len(jobs) == 1 else 'end'}"
