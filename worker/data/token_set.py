"""A set of tokenised rows of at most max_length tokens, kept in this box's cache.

The cache key is all that decides the tokens: content, tokenizer, template, format, length.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loractl.common.artifacts import sha256_of
from loractl.common.data.examples import Example
from loractl.common.errors import DataError
from loractl.common.files import sync
from loractl.common.job.sections import DataFormat, DatasetSpec, Overflow

from .row_forms import form_of
from .token_rows import TokenRows
from .tokens import IGNORED, TokenRow

_CACHE_VERSION = 8

_COUNTS = "counts.json"


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Tokenised rows, and what happened to those that were too long."""

    rows: TokenRows
    truncated: int  # examples, as below
    too_long: int  # over max_length, and dropped
    apart: int = 0  # conversations with a row for each of their answers
    apart_rows: int = 0  # and their rows

    @property
    def tokens(self) -> int:
        return self.rows.tokens

    @property
    def supervised(self) -> int:
        return self.rows.count_labels(other_than=IGNORED)


@dataclass(frozen=True, kw_only=True)
class RowTokenizer:
    """Makes the token sets of one job's data, those to train on and those held out."""

    dataset: DatasetSpec
    tokenizer: Any
    format: DataFormat
    cache: Path | None  # None: nothing is cached

    def tokenise(self, examples: Sequence[Example], side: str, file: str) -> TokenSet:
        """The token set of one side of the split, from the cache if it is there. Raises DataError."""
        folder = None
        if self.cache is not None:
            content = hashlib.sha256("".join(f"{e.number}:{e.content_hash()} " for e in examples).encode()).hexdigest()
            folder = self.cache / "tokenised" / f"{content[:32]}-{self._key[:32]}"
        if folder and (kept := _kept(folder)) is not None:
            return kept
        tokens = fit_examples(examples, file, self.dataset, self.tokenizer, self.format, f" {side}")
        if not folder:
            return tokens
        _keep(tokens, folder)
        return _kept(folder) or tokens

    @functools.cached_property
    def _key(self) -> str:
        """A key that changes with everything that changes the tokens of the same content."""
        tokenizer, dataset = self.tokenizer, self.dataset
        backend = getattr(tokenizer, "backend_tokenizer", None)  # all that a tokenizer does to a text
        said = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
        parts = [
            _CACHE_VERSION,
            hashlib.sha256(said.encode()).hexdigest(),
            tokenizer.chat_template,
            tokenizer.eos_token,
            self.format.value,
            dataset.max_length,
            dataset.on_overflow.value,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fit_examples(
    examples: Sequence[Example], file: str, dataset: DatasetSpec, tokenizer: Any, format: DataFormat, side: str = ""
) -> TokenSet:
    """Tokenise each example and apply on_overflow to those over max_length. Raises DataError, see no_row_fits."""
    fitting = _Fitting(file=file, dataset=dataset, tokenizer=tokenizer, format=format)
    rows = TokenRows.of(fitting.rows_of(examples))
    if not rows:
        raise no_row_fits(file, dataset.max_length, fitting.left_out, side)
    return TokenSet(
        rows=rows,
        truncated=fitting.truncated,
        too_long=len(fitting.left_out),
        apart=fitting.apart,
        apart_rows=fitting.apart_rows,
    )


def no_row_fits(file: str, max_length: int, lengths: Sequence[int], side: str = "") -> DataError:
    """The error for a file, or for one side of its split, whose rows are all too long; `lengths`: theirs."""
    least, most = min(lengths), max(lengths)
    what = f"has no row{side} of at most {max_length} tokens: the shortest has {least}, the longest {most}"
    return DataError(file, what, hint="raise dataset.max_length", kind="too long")


@dataclass(kw_only=True)
class _Fitting:
    """Turns examples into rows one by one, and counts those that do not fit."""

    file: str
    dataset: DatasetSpec
    tokenizer: Any
    format: DataFormat
    truncated: int = field(default=0, init=False)
    left_out: array[int] = field(default_factory=lambda: array("L"), init=False)  # tokens of each
    apart: int = field(default=0, init=False)
    apart_rows: int = field(default=0, init=False)

    def rows_of(self, examples: Sequence[Example]) -> Iterator[TokenRow]:
        file, dataset, form = self.file, self.dataset, form_of(self.format)
        for example in examples:
            try:
                rows = form.encode(example, self.tokenizer)
            except ValueError as error:
                raise DataError(file, str(error), row=example.number) from error
            longest = max(form.length(row) for row in rows)
            if longest > dataset.max_length:
                if dataset.on_overflow is Overflow.ERROR:
                    raise DataError(
                        file,
                        f"has {longest} tokens, dataset.max_length is {dataset.max_length}",
                        row=example.number,
                        hint="raise dataset.max_length, or set dataset.on_overflow to truncate or drop",
                    )
                if dataset.on_overflow is Overflow.DROP:
                    self.left_out.append(longest)
                    continue
                rows = [form.cut(row, example, self.tokenizer, dataset.max_length) for row in rows]
                self.truncated += 1
            rows = list(filter(form.teaches, rows))
            if not rows and longest <= dataset.max_length:
                raise DataError(file, f"has no {form.lesson} to learn", row=example.number)
            if not rows:
                raise DataError(
                    file,
                    f"has no {form.lesson} to learn within dataset.max_length ({dataset.max_length})",
                    row=example.number,
                    hint="raise dataset.max_length, or set dataset.on_overflow: drop",
                )
            if len(rows) > 1:
                self.apart += 1
                self.apart_rows += len(rows)
            yield from rows


def _kept(folder: Path) -> TokenSet | None:
    """The token set cached there; None if there is none. A damaged one, as after a power loss, is removed."""
    with contextlib.suppress(FileNotFoundError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        counts = json.loads((folder / _COUNTS).read_text())
        if counts.pop("sha256") == _sums(folder):
            return TokenSet(rows=TokenRows.load(folder), **counts)
    if folder.exists():
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
        with contextlib.suppress(OSError):
            folder.rename(aside / "torn")  # gone at once for every reader, unless another trainer was first
        shutil.rmtree(aside, ignore_errors=True)
    return None


def _keep(tokens: TokenSet, folder: Path) -> None:
    """Write to a temporary folder, sync and rename: two trainers may prepare the same data at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        tokens.rows.save(aside)
        counts = {name: value for name, value in vars(tokens).items() if name != "rows"}
        (aside / _COUNTS).write_text(json.dumps({**counts, "sha256": _sums(aside)}))
        for path in (*aside.iterdir(), aside):
            sync(path)
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside)  # the other trainer was first; its content is the same
        if not folder.exists():
            raise


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in TokenRows.files(folder)}
