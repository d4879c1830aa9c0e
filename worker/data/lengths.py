"""What a tokenizer finds in a job's local data, for a plan or a submit on a machine with the training stack.

    python -m loractl.worker.data.lengths < spec.json
    python -m loractl.worker.data.lengths --check < spec.json

Prints {"lengths": {"train": tokens, "evaluate": tokens, "rows": number, "labels": number, "longest": [tokens]}, "rows":
{"train": number, "held_out": number, "cut": number, "left_out": number}}, where labels are a classifier's, else null,
longest has the longest rows to train on, and rows counts the rows used; with --check {"findings": [...]} about the rows
used. Or {"error": sentence, "hint": sentence or null, "of_rows": whether a row is wrong, and not what reads it}.
With --ends-with=PID it ends once that process, the command that asks, has ended.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import sys
import threading
import time
from typing import Any

from loractl.common.errors import DataError, LoractlError
from loractl.common.job.kinds import PAIRS
from loractl.common.job.spec import JobSpec
from loractl.common.memory.step import MOST_LONGEST, Lengths
from loractl.common.settings import load_settings
from loractl.worker.base.model import load_tokenizer

from .check import check_data
from .origin import dataset_hash
from .prepared import PreparedData, packed, prepare_data
from .prompt import templated, today


def lengths_of(data: PreparedData) -> Lengths:
    """The longest rows to train on and the longest held-out or final row, in tokens."""
    longest = heapq.nlargest(MOST_LONGEST, data.trained_rows.lengths)
    texts = data.trained_rows.texts if data.format in PAIRS else None
    last = [] if data.final is None else data.final.rows.lengths
    return Lengths(
        train=longest[0],
        longest=tuple(map(int, longest)),
        evaluate=max(*data.held_out.rows.lengths, *last, 0),
        rows=len(data.trained_rows),
        labels=len(data.label_names) or None,
        text=None if texts is None else max(texts),
    )


def main() -> None:
    """Serve one spec."""
    for argument in sys.argv[1:]:
        if argument.startswith("--ends-with="):
            threading.Thread(target=_end_with, args=(int(argument.partition("=")[2]),), daemon=True).start()
    spec = JobSpec.model_validate_json(sys.stdin.read())
    try:
        tokenizer = templated(load_tokenizer(spec.base_model, spec.revision), spec.dataset.template, today())
        told: dict[str, Any] = {}
        if "--check" in sys.argv[1:]:
            told["findings"] = [vars(finding) for finding in check_data(spec, tokenizer).findings]
        else:
            told = _counts(spec, tokenizer)
    except LoractlError as error:
        told = {"error": error.sentence, "hint": error.hint, "of_rows": isinstance(error, DataError)}
    sys.stdout.write(json.dumps(told))


def _end_with(command: int) -> None:
    """A command that is killed must not leave a count of minutes behind."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(command, 0)
            time.sleep(1)
    os._exit(1)


def _counts(spec: JobSpec, tokenizer: Any) -> dict[str, Any]:
    data, cache = spec.dataset, load_settings().cache_dir
    more = [source.path for source in data.more]
    prepared = prepare_data(
        data, data.path, data.eval_path, dataset_hash(data.path), tokenizer, cache, more, final_path=data.final_path
    )
    parts = [prepared.train, prepared.held_out.tokens, *([] if prepared.final is None else [prepared.final.tokens])]
    rows = {
        **dict(zip(("train", "held_out", "final"), (part.rows.examples for part in parts), strict=False)),
        "cut": sum(part.truncated for part in parts),
        "left_out": sum(part.too_long for part in parts),
    }
    return {"lengths": vars(lengths_of(packed(prepared, spec))), "rows": rows}


if __name__ == "__main__":
    main()
