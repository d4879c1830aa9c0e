"""Held-out rows that resemble a row to train on: the same question but for a word, punctuation, or look-alike letters.

Such a row measures memory. Rows are compared as folded words; candidates share rare pairs of neighbouring words, and
rapidfuzz (https://github.com/rapidfuzz/RapidFuzz) measures how far apart they are. Without it, as on a light client,
only rows with the same folded words are found.
"""

from __future__ import annotations

import bisect
import importlib.util
import itertools
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import itemgetter

from .examples import Example

FREQUENT = 20
"""A pair of words in more held-out rows says nothing about one of them: it belongs to their form."""

SHARED = 0.4
"""Share of a held-out row's rare pairs that a candidate has."""

MOST_CANDIDATES = 5
"""For one row to train on, compared word by word."""

MOST_WORDS = 400
"""Of a row: its beginning says enough."""

_SAME_WORD = 85.0
"""From this ratio on, two words are spellings of one."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_]+")
"""A word; of scripts without spaces a character."""

_LOOKALIKES = str.maketrans(
    "\u0430\u0432\u0435\u0455\u0456\u0458\u043a\u043c\u043d\u043e\u0440\u0441\u0442\u0443\u0445\u04bb\u0501\u051b\u051d"
    "\u03b1\u03b9\u03ba\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7\u0131\u0261\u0269",
    "abesijkmhopctyxhdqwaikvoptuxigi",
)
"""Letters of Cyrillic, Greek and phonetic script as the Latin letters that they look like (the common ones of
Unicode's confusables), in lower case."""


def folded_words(text: str) -> list[str]:
    """The words of a text without case, accents, punctuation and look-alike letters."""
    plain = unicodedata.normalize("NFKD", text).casefold().translate(_LOOKALIKES)
    plain = "".join(c for c in plain if not unicodedata.combining(c)) if not plain.isascii() else plain
    return list(itertools.islice((match[0] for match in _WORD.finditer(plain)), MOST_WORDS))


def asked_of(example: Example) -> str:
    """What a row asks, or all of a plain text. Answers and systems' messages, which many rows share, are left out."""
    if example.turns:
        asked = example.turns[: example.answers[-1]]
        return "\n".join(turn.content for turn in asked if turn.role not in ("system", "assistant"))
    return example.prompt or example.text


class Resemblance:
    """Looks at rows to train on one by one, and keeps which held-out row each of them gives away.

    It keeps hashes of a held-out row: 16 bytes for a pair of words.
    """

    def __init__(self, held_out: Sequence[Example]) -> None:
        self._held_out = held_out
        self._same: dict[int, int] = {}  # hash of all words: the place of the first such row
        pairs: list[tuple[int, int]] = []
        for place, example in enumerate(held_out):
            if words := folded_words(asked_of(example)):
                self._same.setdefault(hash(tuple(words)), place)
                pairs += {(_hashed(pair), place) for pair in itertools.pairwise(words)}
        self._pairs, self._places = array("Q"), array("Q")
        self._indexed = Counter[int]()  # rare pairs by place
        for pair, group in itertools.groupby(sorted(pairs), key=itemgetter(0)):
            if len(places := [place for _, place in group]) <= FREQUENT:
                self._pairs.extend(itertools.repeat(pair, len(places)))
                self._places.extend(places)
                self._indexed.update(places)
        self._found: dict[int, int] = {}

    @property
    def found(self) -> dict[int, int]:
        """The number of a row to train on, by the number of the held-out row that resembles it."""
        return {self._held_out[place].number: number for place, number in self._found.items()}

    def see(self, example: Example) -> None:
        words = folded_words(asked_of(example))
        if words and (same := self._same.get(hash(tuple(words)))) is not None:
            self._found.setdefault(same, example.number)
        shared = Counter(place for pair in set(itertools.pairwise(words)) for place in self._having(_hashed(pair)))
        for place, hits in shared.most_common(MOST_CANDIDATES) if self._scores else ():
            if hits >= SHARED * self._indexed[place] and _alike(folded_words(asked_of(self._held_out[place])), words):
                self._found[place] = example.number

    def _having(self, pair: int) -> Iterator[int]:
        """The places of rows with this rare pair that are not found yet."""
        at = bisect.bisect_left(self._pairs, pair)
        while at < len(self._pairs) and self._pairs[at] == pair:
            if (place := self._places[at]) not in self._found:
                yield place
            at += 1

    @cached_property
    def _scores(self) -> bool:
        return importlib.util.find_spec("rapidfuzz") is not None


def _hashed(pair: tuple[str, str]) -> int:
    return hash(pair) & 0xFFFFFFFFFFFFFFFF


def _alike(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two rows differ little: in words spelled differently, and in one or two words that only one row has, none
    of them with a digit."""
    from rapidfuzz.distance import Levenshtein

    shorter, longer = sorted((len(one), len(other)))
    allowed = 0 if shorter < 3 else 1 if shorter < 5 else max(2, shorter // 10)
    if longer - shorter > allowed:
        return False
    apart = 0
    for step in Levenshtein.editops(one, other):
        mine = one[step.src_pos] if step.tag != "insert" else ""
        theirs = other[step.dest_pos] if step.tag != "delete" else ""
        if any(c.isdigit() for c in mine + theirs) or (step.tag == "replace" and not _one_word(mine, theirs)):
            return False
        apart += 1
    return apart <= allowed


def _one_word(one: str, other: str) -> bool:
    from rapidfuzz import fuzz
    from rapidfuzz.distance import Levenshtein

    return fuzz.ratio(one, other) >= _SAME_WORD or (
        min(len(one), len(other)) >= 5 and Levenshtein.distance(one, other) == 1
    )
