"""The rows of an order: read, checked, tokenised, packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from loractl.common.data.giveaway import READ_OFF, Giveaway
from loractl.common.data.inspection import Leaks
from loractl.common.job.spec import JobSpec
from loractl.worker.data.check import findings_about
from loractl.worker.data.packing import packed
from loractl.worker.data.prepared import PreparedData, prepare_data, prepare_regression
from loractl.worker.data.row_forms import with_prompts
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
        final_path=order.final_path,
    )
    if order.regression_path is not None:
        name = spec.evaluation.regression or order.regression_path
        other, commit = prepare_regression(spec.dataset, name, order.regression_path, data.train_examples, tokenizer)
        data = replace(data, regression=other, commits=data.commits | ({"regression": commit} if commit else {}))
    if spec.preference.learns_prompts:
        data = replace(data, train=replace(data.train, rows=with_prompts(data.train.rows)))
    leaks, of_final = Leaks(data.held_out_examples), Leaks.of_final(None if data.final is None else data.final.examples)
    giveaway = Giveaway(len(data.train_examples), data.held_out_examples)
    found = findings_about(spec, data, tokenizer, leaks, of_final, giveaway)
    warnings = tuple(finding.sentence for finding in found if finding.level == "warning")
    if data.final is not None and of_final is not None:
        data = replace(data, final=replace(data.final, **_told(of_final), read_off=_read_off(data)))
    told = _told(leaks)
    told["leaks"] += tuple(finding.text for finding in found if finding.kind in READ_OFF)
    return packed(replace(data, warnings=warnings, read_off=giveaway.read_off, **told), spec)


def _read_off(data: PreparedData) -> str:
    """A clause for the verdict on the final rows, as Giveaway has it for the held-out ones."""
    look = Giveaway(len(data.train_examples), data.final.examples if data.final else (), "of the final file")
    for example in data.train_examples:
        look.see(example)
    list(look.findings())
    return look.read_off


def _told(leaks: Leaks) -> dict[str, Any]:
    return {"leaks": tuple(finding.text for finding in leaks.findings()), "given_away": tuple(leaks.rows)}
