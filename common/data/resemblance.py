"""Held-out rows that resemble a row to train on: the same question but for a word, punctuation, or look-alike letters;
with more text around it; with its sentences in another order; or with some other words.

Such a row measures memory. Rows are compared as folded words; candidates share rare pairs of neighbouring words.
In order, rapidfuzz (https://github.com/rapidfuzz/RapidFuzz) measures how far apart they are; without it, as on a light
client, only rows with the same folded words are found in order. Out of order, the words that two rows share are weighed
by their rarity (Spärck Jones, 1972): how much of the shorter row the other one contains (Broder, 1997), exactly rather
than by MinHash, since the candidates are few. Such rows must also answer alike, unless one has the whole question of
the other, word after word: two questions about one passage, or one with its names swapped, share their words, too. An
answer is alike if it holds the other one, or has most of its words in their order. Labels and letters also agree by
chance: behind them, two rows of one passage must ask alike, too.
"""

from __future__ import annotations

import bisect
import importlib.util
import itertools
import math
import re
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter

from .examples import Example
from .findings import answer_of

FREQUENT = 20
"""A pair of words in more held-out rows says nothing about one of them: it belongs to their form."""

SHARED = 0.4
"""Share of a held-out row's rare pairs that a candidate has."""

MOST_CANDIDATES = 5
"""For one row to train on, compared word by word."""

MOST_WORDS = 400
"""Of a row, half of them from its beginning and half from its end: either may be an instruction or a document that many
rows share."""

CONTAINED, PARTLY = 0.97, 0.7
"""Share of the shorter row's weight that the other one has: all but nothing, or most of it."""

FEWEST_WORDS, WEIGHT = 5, 18.0
"""The fewest different words of the shorter row, and the least weight that two rows share, in nats: rows that share
less may do so by chance. A word of every hundredth row weighs 4.6."""

ALONE = 0.5
"""A row that is contained in part counts if no other row to train on shares more than this share of that weight with
the held-out row: rows of one form all do."""

PASSAGE, ASKED_SHARE, SHORT_ANSWER = 30, 0.65, 5
"""PASSAGE words in a row that two rows share are a passage. A short answer (SHORT_ANSWER words at most, such as a label
or a letter) may agree by chance: then the rows must also share ASKED_SHARE of the weight of what is left of them."""

REWORDED = 0.5
"""Share of the words of the longer of two answers that both have in one order, as one answer worded otherwise does."""

KEPT = 3
"""Rows to train on that are kept for each held-out row, to be weighed at the end."""

_BUCKETS = 1 << 20
"""Counters of words: 4 MB, however many words there are. Two words in one counter weigh a little less."""

_LOWER_BITS = 52
"""Of a pair's hash: pairs are looked for among those that begin with the same 12 bits."""

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


_HIDDEN = re.compile(
    "[\u00ad\u200c-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]|(?<=[a-z0-9])\u200b+(?=[a-z0-9])"
)
"""Characters inside words that nobody sees: soft hyphens, joiners, marks of direction, variation selectors. Zero-width
spaces only within Latin words, since they divide the words of Khmer and Thai."""


def folded_words(text: str) -> list[str]:
    """The words of a text without case, accents, punctuation, hidden characters and look-alike letters; of a long text
    those of its beginning and end."""
    return _ends_of(_every_word(text))


def _ends_of(words: list[str]) -> list[str]:
    return words if len(words) <= MOST_WORDS else words[: MOST_WORDS // 2] + words[-MOST_WORDS // 2 :]


def _every_word(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text).casefold().translate(_LOOKALIKES)
    if not plain.isascii():
        plain = _HIDDEN.sub("", "".join(c for c in plain if not unicodedata.combining(c)))
    return _WORD.findall(plain)


def asked_of(example: Example) -> str:
    """What a row asks, or all of a plain text. Answers and systems' messages, which many rows share, are left out."""
    if example.turns:
        asked = example.turns[: example.answers[-1]]
        return "\n".join(turn.content for turn in asked if turn.role not in ("system", "assistant"))
    return example.prompt or example.text


class Resemblance:
    """Looks at rows to train on one by one, and keeps which held-out row each of them gives away.

    It keeps hashes: 16 bytes for a pair of words of a held-out row, and 4 for each word of the rows nearest to it.
    """

    def __init__(self, held_out: Sequence[Example]) -> None:
        self._held_out = held_out
        self._same: dict[int, int] = {}  # hash of all words: the place of the first such row
        self._rows = array("I", bytes(4 * _BUCKETS))  # how many rows have a word, by its hash
        self._count = 0
        self._near: dict[int, list[tuple[int, _Near]]] = {}  # by place, with the pairs that they share
        pairs: list[tuple[int, int]] = []
        for place, example in enumerate(held_out):
            if every := _every_word(asked_of(example)):
                self._same.setdefault(hash(tuple(every)), place)
                self._counted(words := _ends_of(every))
                pairs += {(_hashed(pair), place) for pair in itertools.pairwise(words)}
        self._pairs, self._places, self._starts = array("Q"), array("I"), array("I", [0])
        self._indexed = Counter[int]()  # rare pairs by place
        for pair, group in itertools.groupby(sorted(pairs), key=itemgetter(0)):
            if len(places := [place for _, place in group]) <= FREQUENT:
                self._pairs.append(pair)
                self._places.extend(places)
                self._starts.append(len(self._places))
                self._indexed.update(places)
        bounds = (bisect.bisect_left(self._pairs, part << _LOWER_BITS) for part in range(1 << 64 - _LOWER_BITS))
        self._bounds = array("I", [*bounds, len(self._pairs)])  # where pairs that begin with the same bits begin
        self._found: dict[int, int] = {}

    @property
    def found(self) -> dict[int, int]:
        """The number of a row to train on, by the number of the held-out row that resembles it."""
        for place, near in self._near.items():
            if place not in self._found and (number := self._contains(place, near)) is not None:
                self._found[place] = number
        return {self._held_out[place].number: number for place, number in self._found.items()}

    def see(self, example: Example) -> None:
        every = _every_word(asked_of(example))
        self._counted(words := _ends_of(every))
        if every and (same := self._same.get(hash(tuple(every)))) is not None:
            self._found.setdefault(same, example.number)
        row: _Near | None = None
        for place, hits in self._sharing(words).most_common(MOST_CANDIDATES):
            if self._is_nearer(place, hits):
                row = row or _Near.of(example, words)
                self._near[place].append((hits, row))
            if (
                self._scores
                and hits >= SHARED * self._indexed[place]
                and _alike(folded_words(asked_of(self._held_out[place])), words)
            ):
                self._found[place] = example.number

    def _counted(self, words: Sequence[str]) -> None:
        self._count += 1
        for word in _hashes({*words}):
            self._rows[word % _BUCKETS] += 1

    def _is_nearer(self, place: int, hits: int) -> bool:
        """Whether a row that shares this many pairs is among the nearest so far, which has then room for it."""
        near = self._near.setdefault(place, [])
        if len(near) == KEPT:
            least = min(near, key=itemgetter(0))
            if least[0] >= hits:
                return False
            near.remove(least)
        return True

    def _contains(self, place: int, near: Sequence[tuple[int, _Near]]) -> int | None:
        """The number of the row that has the held-out row's words, or the other way round; None without one."""
        asked = folded_words(asked_of(self._held_out[place]))
        ordered = _hashes(asked)
        words, digits = {*ordered}, {*_digits(asked)}
        whole = self._weight(words)
        shared = sorted(((self._weight(words.intersection(row.words)), row) for _, row in near), key=itemgetter(0))
        weight, row = shared[-1]
        other = {*row.words}
        theirs = self._weight(other)
        shorter, of_shorter, of_longer = (words, digits, row.digits) if whole <= theirs else (other, row.digits, digits)
        if weight < WEIGHT or len(shorter) < FEWEST_WORDS or not {*of_shorter} <= {*of_longer}:
            return None
        if _holds(row.words, ordered) or _holds(ordered, row.words):
            return row.number
        answer = _answer(self._held_out[place])
        if not self._same_answer(row.answer, answer):
            return None
        share, next_best = weight / min(whole, theirs), shared[-2][0] if len(shared) > 1 else 0.0
        if share < CONTAINED and not (share >= PARTLY and next_best <= ALONE * weight):
            return None
        return None if len(answer) <= SHORT_ANSWER and self._ask_otherwise(ordered, row.words) else row.number

    def _same_answer(self, one: array[int], other: array[int]) -> bool:
        """Whether one answer has all of the other one, or most of its words in their order."""
        if _holds(one, other) or _holds(other, one):
            return True
        if not self._scores or min(len(one), len(other)) <= SHORT_ANSWER:
            return False
        from rapidfuzz.distance import LCSseq

        return LCSseq.normalized_similarity(one, other) >= REWORDED

    def _ask_otherwise(self, one: array[int], other: array[int]) -> bool:
        """Whether two rows with a passage in common share little of what else they say."""
        rest = sorted((_beyond(one, other), _beyond(other, one)), key=self._weight)
        shared = self._weight(rest[0] & rest[1])
        return len(rest[0]) >= FEWEST_WORDS and shared < ASKED_SHARE * self._weight(rest[0])

    def _weight(self, words: Iterable[int]) -> float:
        return sum(math.log(self._count / self._rows[word % _BUCKETS]) for word in words)

    def _sharing(self, words: Sequence[str]) -> Counter[int]:
        """How many rare pairs of words each row shares with these, by its place, but for rows that are found."""
        every, bounds, starts, places = self._pairs, self._bounds, self._starts, self._places
        shared: list[int] = []
        for pair in dict.fromkeys(itertools.pairwise(words)):  # in order: a set has another one in each process
            hashed = _hashed(pair)
            part = hashed >> _LOWER_BITS
            at = bisect.bisect_left(every, hashed, bounds[part], last := bounds[part + 1])
            if at < last and every[at] == hashed:
                shared += places[starts[at] : starts[at + 1]]
        counted = Counter(shared)
        for place in self._found.keys() & counted.keys():
            del counted[place]
        return counted

    @cached_property
    def _scores(self) -> bool:
        return importlib.util.find_spec("rapidfuzz") is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Near:
    """A row to train on that shares rare pairs of words with a held-out row."""

    number: int
    words: array[int]  # all of them, in order
    digits: array[int]  # those words that have a digit
    answer: array[int]  # all words of its answer, in order

    @classmethod
    def of(cls, example: Example, words: Sequence[str]) -> _Near:
        return cls(number=example.number, words=_hashes(words), digits=_digits(words), answer=_answer(example))


def _hashes(words: Iterable[str]) -> array[int]:
    """A hash of each word, which is the same in every process."""
    return array("I", map(_hash_of, words))


@lru_cache(maxsize=1 << 16)
def _hash_of(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def _answer(example: Example) -> array[int]:
    """The words of what a row answers, in order, or its signs if it has no words; none of a plain text."""
    if not (example.turns or example.prompt or example.label is not None):
        return array("I")
    answer = answer_of(example)
    return _hashes(folded_words(answer) or [answer.strip()])


def _holds(answer: array[int], other: array[int]) -> bool:
    """Whether a text has the other one's words, one after another."""
    size = len(other)
    return any(answer[at : at + size] == other for at in range(len(answer) - size + 1))


def _beyond(words: array[int], others: array[int]) -> set[int]:
    """Those of a row's words that are in no passage of the other row."""
    passages = {others[at : at + PASSAGE].tobytes() for at in range(len(others) - PASSAGE + 1)}
    inside = {
        place
        for at in range(len(words) - PASSAGE + 1)
        if words[at : at + PASSAGE].tobytes() in passages
        for place in range(at, at + PASSAGE)
    }
    return {word for place, word in enumerate(words) if place not in inside}


def _digits(words: Sequence[str]) -> array[int]:
    return _hashes([word for word in words if any(map(str.isdigit, word))])


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
