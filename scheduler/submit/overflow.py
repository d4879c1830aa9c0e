"""Checks, before a job is queued, for rows that are too long for it.

If on_overflow: truncate cuts a row whose question alone fills it, nothing of it is learned. The search for such
questions works without the training stack, whose start takes seconds: that is asked only if one may be too long.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loractl.common.errors import UsageError
from loractl.common.job.sections import DataFormat, Overflow, SourceSpec

from .data import is_local, unreadable_here
from .lengths import ask_tokenizer, obstacle_to_count

if TYPE_CHECKING:
    from loractl.common.data.examples import Example
    from loractl.common.job.spec import JobSpec

MARKS = 48
"""Tokens that a chat template writes around a question: its marks, the date, a system message of its own."""


def check_overflow(spec: JobSpec, announce: Callable[[], None] = lambda: None) -> str | None:
    """Refuse rows that are too long for a job with `on_overflow: error`, and rows in which `truncate` leaves nothing to
    learn. Returns why they can't be counted here.

    Raises UsageError, DataError.
    """
    overflow = spec.dataset.on_overflow
    if overflow is Overflow.DROP or (overflow is Overflow.TRUNCATE and not may_fill_a_row(spec)):
        return None
    if (obstacle := obstacle_to_count(spec)) is not None:
        return obstacle
    announce()
    counted = ask_tokenizer(spec)
    if counted.get("of_rows"):
        raise UsageError(counted["error"], counted["hint"])
    return None if "lengths" in counted else str(counted["error"])


def unchecked(obstacle: str | None) -> list[str]:
    """The message if check_overflow could not look."""
    return [f"Not checked: whether rows are too long, {obstacle}. The worker will check it."] if obstacle else []


def may_fill_a_row(spec: JobSpec) -> bool:
    """Whether some row may have dataset.max_length tokens before its first answer. Raises DataError."""
    questions = _long_ones(spec)
    first = next(questions, None)
    if first is None or (count := _counter(Path(spec.base_model))) is None:
        return first is not None
    return any(count(question) + MARKS >= spec.dataset.max_length for question in itertools.chain([first], questions))


def _long_ones(spec: JobSpec) -> Iterator[str]:
    """The questions with at least as many bytes as a row may have tokens: no token is shorter than a byte."""
    from loractl.common.data.fields import Reading
    from loractl.common.data.formats import detect_format, map_columns, parse_each
    from loractl.common.data.rows import open_rows

    dataset = spec.dataset
    held = [SourceSpec(path=dataset.eval_path, split=dataset.eval_split or "train")] if dataset.eval_path else []
    held += [SourceSpec(path=dataset.final_path)] if dataset.final_path else []
    for source in (*dataset.sources, *held):
        text = source.path
        if not is_local(text) or unreadable_here(text):
            continue
        columns = dataset.columns if source.columns is None else source.columns
        rows = map_columns(open_rows(Path(text), source.split), columns, text)
        format, _ = detect_format(rows, text, source.format or dataset.format)
        if format in (DataFormat.TEXT, DataFormat.CLASSIFICATION):  # all is learned, or no token is
            continue
        for example in parse_each(rows, format, text, dataset.template, Reading.of(dataset))[0]:
            question = _before_the_first_answer(example)
            if len(question.encode("utf-8", "surrogatepass")) >= dataset.max_length:
                yield question


def _before_the_first_answer(example: Example) -> str:
    first = example.answers[0] if example.turns else 0
    return "\n".join(turn.said for turn in example.turns[:first]) or example.prompt


def _counter(base: Path) -> Callable[[str], int] | None:
    """Counts a text's tokens with the base's tokenizer; None if that, or the library that reads it, is not here."""
    file = base / "tokenizer.json"
    if importlib.util.find_spec("tokenizers") is None or not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # noqa: BLE001  the library has no error of its own; what is wrong with the file the worker says
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
