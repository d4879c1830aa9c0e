"""What a job's own tokenizer finds in its rows, in a process with the training stack: their lengths, and findings."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loractl.common.data.rows import size_of_rows
from loractl.common.errors import DataError
from loractl.common.fingerprint import has_tokenizer
from loractl.common.memory.step import Lengths

if TYPE_CHECKING:
    from loractl.common.data.findings import Finding
    from loractl.common.job.spec import JobSpec

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


def used_findings(spec: JobSpec) -> list[Finding] | None:
    """The findings about the rows that are used, if the tokenizer that decides which is here; else None."""
    from loractl.common.data.findings import Finding

    if obstacle_to_count(spec) is not None:
        return None
    told = ask_tokenizer(spec, "--check")
    if "error" in told:
        return None
    return [Finding(**{**finding, "rows": tuple(finding["rows"])}) for finding in told["findings"]]


def obstacle_to_count(spec: JobSpec) -> str | None:
    """Why the rows can't be counted on this machine; None: they can."""
    if not has_tokenizer(Path(spec.base_model)):
        return "there is no tokenizer to count them with"
    try:
        for source in spec.dataset.sources:
            if Path(source.path).exists():
                size_of_rows(Path(source.path))
            else:
                return "the data is not on this machine to count them"
    except DataError as error:
        return error.sentence
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
    told: dict[str, Any] = (
        json.loads(done.stdout) if done.returncode == 0 and done.stdout else {"error": "the count failed"}
    )
    return told
