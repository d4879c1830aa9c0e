"""The rows of an order: read, checked, tokenised, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loractl.common.data.examples import Example, Examples
from loractl.common.data.findings import number_rows
from loractl.common.data.giveaway import READ_OFF, Giveaway
from loractl.common.data.inspection import Leaks
from loractl.common.errors import DataError
from loractl.common.job.spec import JobSpec
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.data.check import findings_about
from loractl.worker.data.prepared import (
    MeasuredRows,
    PreparedData,
    packed,
    prepare_data,
    prepare_regression,
    rows_taught,
)
from loractl.worker.data.row_forms import with_prompts
from loractl.worker.protocol.messages import Start, Taught

BEFORE_ALONE = "resemble rows that the adapter before it was trained on"
BEFORE = "resemble rows that it, or the adapter before it, was trained on"


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
    held_out, final = data.held_out, data.final
    leaks, of_final = Leaks(held_out.examples), Leaks.of_final(None if final is None else final.examples)
    giveaway = Giveaway(len(data.train_examples), held_out.examples)
    found = findings_about(spec, data, tokenizer, leaks, of_final, giveaway)
    warnings = tuple(finding.sentence for finding in found if finding.level == "warning")
    if final is not None and of_final is not None:
        final = replace(final, **_told(of_final), **_form_of(data.train_examples, final))
    told = _told(leaks)
    told["leaks"] += tuple(finding.text for finding in found if finding.kind in READ_OFF)
    held_out = replace(held_out, read_off=giveaway.read_off, rule=giveaway.rule, **told)
    data = replace(data, warnings=warnings, held_out=held_out, final=final)
    if order.init_from is not None:
        data = _after(data, order.init_from.taught)
    return packed(data, spec)


def _after(data: PreparedData, lessons: Sequence[Taught]) -> PreparedData:
    """The data, knowing which of the rows to measure on were learned by adapters before this one: the bare base, with
    which it is compared, does not know them. Pairs are compared with that adapter: it knows the chosen answers, so to
    prefer what is known is enough there."""
    own, rows, lost = {example.digest() for example in data.train_examples}, list[Examples](), list[str]()
    for taught in lessons:
        try:
            every = None if taught.dataset is None else rows_taught(taught.dataset, taught.paths)
        except (DataError, TrainingFailed):
            every = None
        if every is None:
            lost.append(str(taught.job_id))
        else:
            rows.append(every.part(place for place, one in enumerate(every.digests) if one not in own))
    jobs = " or ".join(str(taught.job_id) for taught in lessons if str(taught.job_id) not in lost)
    unknown = [f"what job {job} was trained on, before this one, is not known" for job in lost]
    warnings = list(data.warnings) + unknown

    def knowing(side: MeasuredRows, called: str) -> MeasuredRows:
        look = Leaks(side.examples)
        for some in rows:
            look.see_all(some)
        text = f"{{n}} {called} {{is|are}} like rows that job {jobs} was trained on, before this one"
        known: list[int] = look.rows
        told: list[str] = [number_rows(text, len(known))] if known else []
        warnings.extend(told)
        return replace(
            side,
            leaks=(*side.leaks, *told, *unknown),
            given_away=tuple(sorted({*side.given_away, *known})),
            resemble=(BEFORE if side.given_away else BEFORE_ALONE) if known else side.resemble,
        )

    held_out = knowing(data.held_out, "held out")
    final = None if data.final is None else knowing(data.final, "of the final ones")
    return replace(data, held_out=held_out, final=final, warnings=tuple(warnings))


def _form_of(train: Sequence[Example], final: MeasuredRows) -> dict[str, Any]:
    """How the answers of the final rows can be told, as Giveaway has it for the held-out ones."""
    look = Giveaway(len(train), final.examples, "of the final file")
    for example in train:
        look.see(example)
    list(look.findings())
    return {"read_off": look.read_off, "rule": look.rule}


def _told(leaks: Leaks) -> dict[str, Any]:
    return {"leaks": tuple(finding.text for finding in leaks.findings()), "given_away": tuple(leaks.rows)}
