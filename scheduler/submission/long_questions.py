"""Questions that alone may fill a row: where on_overflow: truncate cuts such a row, nothing of it is learned.

Looked for without the training stack, whose start takes seconds: only where a question may be too long is it asked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loractl.common.job.sections import DataFormat

from .data import is_local, unreadable_here

if TYPE_CHECKING:
    from loractl.common.data.example import Example
    from loractl.common.job.spec import JobSpec

MARKS = 48
"""Tokens that a chat template writes around a question: its marks, the date, a system message of its own."""


def may_fill_a_row(spec: JobSpec) -> bool:
    """Whether the part of some row before its first answer may have dataset.max_length tokens. Raises DataError."""
    count, most = _counter(Path(spec.base_model)), spec.dataset.max_length
    return any(count is None or count(question) + MARKS >= most for question in _long_ones(spec))


def _long_ones(spec: JobSpec) -> Iterator[str]:
    """The questions with as many bytes as a row may have tokens: no token is shorter than a byte."""
    from loractl.common.data.formats import detect_format, map_columns, parse_each
    from loractl.common.data.rows import DataFile

    dataset = spec.dataset
    files = [text for text in (dataset.path, dataset.eval_path) if text is not None and is_local(text)]
    for text in files:
        if unreadable_here(text):
            continue
        rows = map_columns(DataFile(Path(text)), dataset.columns, text)
        format, _ = detect_format(rows, text, dataset.format)
        if format in (DataFormat.TEXT, DataFormat.CLASSIFICATION):  # all is learned, or no token is
            continue
        for example in parse_each(rows, format, text, dataset.template)[0]:
            question = _before_the_first_answer(example)
            if len(question.encode("utf-8", "surrogatepass")) >= dataset.max_length:
                yield question


def _before_the_first_answer(example: Example) -> str:
    first = next((place for place, turn in enumerate(example.turns) if turn.role == "assistant"), 0)
    return "\n".join(turn.content for turn in example.turns[:first]) or example.prompt


def _counter(base: Path) -> Callable[[str], int] | None:
    """Counts a text's tokens as the base's tokenizer makes them; None where it is not here, or what reads it."""
    file = base / "tokenizer.json"
    if importlib.util.find_spec("tokenizers") is None or not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # noqa: BLE001  the library has no error of its own; what is wrong with the file the worker says
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
