"""The longest rows of a job's local data after tokenising, for a plan on a machine that has the training stack.

    python -m loractl.worker.data.lengths < spec.json

Prints {"train": tokens, "evaluate": tokens, "rows": number, "labels": number}, or {"error": sentence}; labels are a
classifier's, else null.
"""

from __future__ import annotations

import json
import sys

from loractl.common.errors import LoractlError
from loractl.common.job.spec import JobSpec
from loractl.common.memory.step import Lengths
from loractl.common.settings import load_settings
from loractl.worker.base.model import load_tokenizer

from .origin import dataset_hash
from .packing import packed
from .prepared import PreparedData, prepare_data


def lengths_of(data: PreparedData) -> Lengths:
    """The longest row to train on and the longest one held out, in tokens."""
    return Lengths(
        train=max(len(row.input_ids) for row in data.trained_rows),
        evaluate=max(len(row.input_ids) for row in data.held_out.rows),
        rows=len(data.trained_rows),
        labels=len(data.label_names) or None,
    )


def main() -> None:
    """Serve one spec."""
    spec = JobSpec.model_validate_json(sys.stdin.read())
    data = spec.dataset
    try:
        tokenizer = load_tokenizer(spec.base_model, spec.revision)
        cache = load_settings().cache_dir
        prepared = prepare_data(data, data.path, data.eval_path, dataset_hash(data.path), tokenizer, cache)
    except LoractlError as error:
        sys.stdout.write(json.dumps({"error": error.sentence}))
        return
    sys.stdout.write(json.dumps(vars(lengths_of(packed(prepared, spec)))))


if __name__ == "__main__":
    main()
