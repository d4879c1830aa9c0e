"""A repetition as text: what can't be the same, before it runs, and whether it came out the same."""

from __future__ import annotations

import json
from typing import Any

from loractl.common.text import clean_line, minus
from loractl.scheduler.cli.screen import Screen, table

from .answer import Repetition
from .sameness import Pair, RowLosses, Sameness


def repetition_text(repetition: Repetition, screen: Screen) -> str:
    """How the job runs again, and what could change its result."""
    spec, adjustment = repetition.spec, repetition.adjustment
    micro = adjustment.micro_batch or spec.training.per_device_train_batch_size
    accumulated = adjustment.accumulation or spec.training.gradient_accumulation_steps
    assert not isinstance(spec.method, list)
    lines = [
        f"Job {repetition.job_id} ({clean_line(spec.name)}) again: {spec.method.value}, seed {spec.training.seed}, "
        f"batch {micro} x {accumulated}."
    ]
    if not repetition.caveats:
        return "\n".join([*lines, "No reason is known for a different result."])
    rows = [[caveat.what, caveat.then, caveat.now] for caveat in repetition.caveats]
    return "\n".join([*lines, "Not the same, or not known to be:", *table(["WHAT", "THEN", "NOW"], rows, screen)])


def sameness_text(answer: Sameness, screen: Screen) -> str:
    """The verdict in a sentence. If not the same: by how much it differs, from which step on, and what differed
    before."""
    if answer.same:
        rows = answer.row_losses.rows if answer.row_losses else 0
        return (
            f"{answer.second} came out the same as {answer.first}: the adapters are equal bit for bit "
            f"(sha256 {answer.weights.first[:12]}), and so are the losses on {rows} held-out rows."
        )
    numbers = [str(answer.first), str(answer.second)]
    apart = [answer.weights, *(loss for loss in answer.losses if not loss.same)]
    measured = [[p.what, _shown(p.first), _shown(p.second), _shift(p)] for p in apart]
    but = ": the adapters are equal, their measurements are not" if answer.weights.same else ""
    lines = [
        f"{answer.second} did not come out the same as {answer.first}{but}.",
        "",
        *table(["MEASURED", *numbers, "DIFFERENCE"], measured, screen),
        "",
        f"{len(answer.losses) + 1 - len(apart)} of {len(answer.losses)} numbers are equal. "
        + _rows_sentence(answer.row_losses),
    ]
    if answer.parted_at is not None:
        lines.append(f"The training losses diverge at step {answer.parted_at}.")
    if not answer.ran_with:
        return "\n".join([*lines, "The reports show no difference between the two runs."])
    ran_with = [[pair.what, _shown(pair.first), _shown(pair.second)] for pair in answer.ran_with]
    return "\n".join([*lines, "", *table(["RAN WITH", *numbers], ran_with, screen)])


def _rows_sentence(losses: RowLosses | None) -> str:
    if losses is None:
        return "They were measured on other held-out rows."
    if losses.row is None:
        return f"The losses of all {losses.rows} held-out rows are equal."
    largest = "not finite" if losses.largest is None else f"{losses.largest:.2g} nats"
    return (
        f"Of {losses.rows} held-out rows {losses.equal} have equal losses; the largest difference is {largest}, "
        f"of row {losses.row}."
    )


def _shown(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = clean_line(value if isinstance(value, str) else json.dumps(value))
    return text[:12] if len(text) == 64 else text[:40]  # the beginning of a hash


def _shift(pair: Pair) -> str:
    if pair.same:
        return "equal"
    return "other" if pair.difference is None else minus(f"{pair.difference:+.2g}")
