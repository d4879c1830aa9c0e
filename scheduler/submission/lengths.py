"""The lengths of a job's rows, counted by its own tokenizer in a process of the training stack."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loractl.common.memory.step import Lengths

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec

LENGTHS_TIMEOUT_S = 300
"""Counting a large data set's tokens takes as long as the training's own preparation, once."""


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """What is known of the rows' lengths."""

    lengths: Lengths | None  # None: every row is taken to be max_length tokens long
    sentence: str  # what a plan was made for


def row_lengths(spec: JobSpec, announce: Callable[[], None] = lambda: None) -> RowLengths:
    """The rows' own lengths where they can be counted here. `announce` is called before a count: it takes a while."""
    obstacle = _obstacle(spec)
    if obstacle is None:
        announce()
        counted = _count(spec)
        if "error" not in counted:
            lengths = Lengths(**counted)
            longest = f"Longest row: {lengths.train} tokens, held out {lengths.evaluate}"
            return RowLengths(lengths=lengths, sentence=f"{longest}; max_length is {spec.dataset.max_length}.")
        obstacle = counted["error"]
    planned = f"Planned for rows of max_length, {spec.dataset.max_length} tokens"
    return RowLengths(lengths=None, sentence=f"{planned}: {obstacle}.")


def _obstacle(spec: JobSpec) -> str | None:
    """Why the rows can't be counted on this machine; None: they can."""
    folder = Path(spec.base_model)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return "there is no tokenizer to count them with"
    if not Path(spec.dataset.path).exists():
        return "the data is not on this machine to count them"
    if importlib.util.find_spec("torch") is None:
        return "the training stack is not on this machine to count them"
    return None


def _count(spec: JobSpec) -> dict[str, Any]:
    """The fields of Lengths, or an `error`."""
    done = subprocess.run(
        [sys.executable, "-m", "loractl.worker.data.lengths"],
        input=spec.model_dump_json(),
        capture_output=True,
        text=True,
        timeout=LENGTHS_TIMEOUT_S,
        check=False,
    )
    told: dict[str, Any] = (
        json.loads(done.stdout) if done.returncode == 0 and done.stdout else {"error": "the count failed"}
    )
    return told
