"""The rows of an order: read, checked, tokenised, packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from loractl.common.data.inspection import LEAKS, Leaks
from loractl.common.job.spec import JobSpec
from loractl.worker.data.check import findings_about
from loractl.worker.data.packing import packed
from loractl.worker.data.prepared import PreparedData, prepare_data, prepare_regression
from loractl.worker.protocol.messages import Start


def prepare_rows(order: Start, spec: JobSpec, tokenizer: Any) -> PreparedData:
    """Prepare the data as the job asks. `tokenizer`: with the job's template. Raises DataError, TrainingFailed."""
    data = prepare_data(
        spec.dataset,
        order.data_path,
        order.eval_path,
        order.data_sha256,
        tokenizer,
        Path(order.cache_dir),
        order.more_paths,
    )
    if order.regression_path is not None:
        name = spec.evaluation.regression or order.regression_path
        other, commit = prepare_regression(spec.dataset, name, order.regression_path, data.train_examples, tokenizer)
        data = replace(data, regression=other, commits=data.commits | ({"regression": commit} if commit else {}))
    given_away = Leaks(data.held_out_examples)
    found = findings_about(spec, data, tokenizer, given_away)
    warnings = tuple(finding.sentence for finding in found if finding.level == "warning")
    leaks = tuple(finding.text for finding in found if finding.kind in LEAKS)
    return packed(replace(data, warnings=warnings, leaks=leaks, given_away=tuple(given_away.rows)), spec)
