"""How long a job's rows are, as far as this machine can say: by the job's own tokenizer, in a process with the training
stack. Rows that are too long are refused, or left out of what is checked."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.data.findings import Finding
from loractl.common.data.rows import size_of_rows
from loractl.common.errors import DataError, UsageError
from loractl.common.fingerprint import has_tokenizer
from loractl.common.job.sections import DataFormat, Overflow, SourceSpec
from loractl.common.job.spec import JobSpec
from loractl.common.memory.step import Lengths
from loractl.common.progress import Report

from .data import check_data, is_local, unreadable_here

LENGTHS_TIMEOUT_S = 300
"""Counting a large data set's tokens takes as long as the training's own preparation, once."""


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """What is known about the rows' lengths."""

    lengths: Lengths | None  # None: every row is taken to be max_length tokens long
    rows: Mapping[str, int] | None  # used: `train`, `held_out`, perhaps `final`; and those too long: `cut`, `left_out`
    sentence: str  # what a plan assumes


def row_lengths(spec: JobSpec, announce: Callable[[], None] = lambda: None) -> RowLengths:
    """The rows' own lengths, if they can be counted here. `announce` is called before a count: it takes a while."""
    obstacle = obstacle_to_count(spec)
    halves = spec.kind.halves
    noun, of_both = ("row", "") if halves == 1 else ("pair", " of both answers with their prompts")
    if obstacle is None:
        announce()
        counted = ask_tokenizer(spec)
        if "error" not in counted:
            told, rows = counted["lengths"], counted["rows"]
            lengths = Lengths(**{**told, "longest": tuple(told["longest"])})
            longest = f"Longest {noun}: {lengths.train} tokens{of_both}, held out {lengths.evaluate}"
            cut = f", which cuts {rows['cut']}" if rows["cut"] else ""
            used = f"{rows['train']} {noun}s to train on, {rows['held_out']} held out"
            used += f", {rows['final']} final" if "final" in rows else ""
            used += f", {rows['left_out']} too long and left out" if rows["left_out"] else ""
            sentence = f"{longest}; max_length is {spec.dataset.max_length}{cut}. {used}."
            return RowLengths(lengths=lengths, rows=rows, sentence=sentence)
        obstacle = counted["error"]
    most = f"{'twice ' * (halves > 1)}max_length, {halves * spec.dataset.max_length} tokens"
    planned = f"Planned for {noun}s of {most}"
    return RowLengths(lengths=None, rows=None, sentence=f"{planned}: {obstacle}.")


def check_used_data(spec: JobSpec, report: Report = lambda what, done, total: None) -> tuple[list[Finding], str | None]:
    """As check_data, but only for the rows that on_overflow: drop leaves; a sentence if they are unknown here.

    Raises DataError, also if nothing is left, or nothing would be learned.
    """
    from loractl.common.data.findings import Finding

    findings, note = check_data(spec, report), None
    if spec.dataset.on_overflow is Overflow.DROP:
        report("Counting tokens", 0, 1)
        told = ask_tokenizer(spec, "--check") if obstacle_to_count(spec) is None else {}
        if "findings" in told:
            findings = [Finding(**{**finding, "rows": tuple(finding["rows"])}) for finding in told["findings"]]
        else:
            longer = f"rows of more than {spec.dataset.max_length} tokens"
            note = f"Note: {longer} will be left out; without a tokenizer here, warnings count them as well."
    for finding in findings:
        if finding.level == "error":
            raise DataError(spec.dataset.path, finding.sentence, hint=finding.hint, kind=finding.kind)
    return findings, note


def obstacle_to_count(spec: JobSpec) -> str | None:
    """Why the rows can't be counted on this machine; None: they can."""
    paths = [Path(source.path) for source in spec.dataset.sources]
    try:
        for path in filter(Path.is_absolute, paths):  # the others are on the hub
            size_of_rows(path)
    except DataError as error:
        return error.sentence
    except OSError:
        return f"{path} is not on this machine to count them"
    if not has_tokenizer(Path(spec.base_model)):
        return "there is no tokenizer to count them with"
    if not all(map(Path.is_absolute, paths)):
        return "the data is not on this machine to count them"
    if importlib.util.find_spec("torch") is None:
        return "the training stack is not on this machine to count them"
    return None


def ask_tokenizer(spec: JobSpec, *options: str) -> dict[str, Any]:
    """What worker/data/lengths.py prints, or an `error`."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "loractl.worker.data.lengths", *options, f"--ends-with={os.getpid()}"],
            input=spec.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=LENGTHS_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"the count took more than {LENGTHS_TIMEOUT_S} s"}
    failed = done.returncode != 0 or not done.stdout
    told: dict[str, Any] = {"error": "the count failed"} if failed else json.loads(done.stdout)
    return told


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
            before = example.turns[: example.answers[0]] if example.turns else ()
            question = "\n".join(turn.said for turn in before) or example.prompt
            if len(question.encode("utf-8", "surrogatepass")) >= dataset.max_length:
                yield question


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
