"""The matrix for people, on a terminal or as a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files

from loractl.common.text import signed
from loractl.common.units import amount
from loractl.worker.evaluation.comparison import Compared

from .matrix import ACCURACY, LOSS, ROUGE_L, Matrix, MatrixRow, reading

NAMES = {LOSS: "loss, nats", ACCURACY: "accuracy, %", ROUGE_L: "ROUGE-L, %"}


def matrix_text(matrix: Matrix) -> str:
    """The tables for a terminal: answers, then losses, then what it costs."""
    name = matrix.base_model.rpartition("/")[2]
    text = [f"{len(matrix.rows)} adapters on {name} ({matrix.precision}), {len(matrix.tasks)} tasks.", ""]
    answers = {task.name: task.measure for task in matrix.tasks}
    text += _table(matrix, answers)
    if set(answers.values()) != {LOSS}:
        text += ["", *_table(matrix, dict.fromkeys(answers, LOSS))]
    if others := [row.name for row in matrix.rows if not row.as_trained]:
        text += ["", f"Trained on a base in another arithmetic than {matrix.precision}: {', '.join(others)}."]
    if any(count for row in matrix.rows for count in row.trained_on.values()):
        text += ["", "* trained on rows of this task: no measure of what it has learned."]
    return "\n".join([*text, "", *costs(matrix)])


def matrix_page(matrix: Matrix) -> str:
    """The heat map: no script, no font, no picture from elsewhere."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(reading=reading, number=_number, signed=_signed, names=NAMES, shade=_shade)
    template = environment.from_string(
        (files("loractl.worker.serving.matrix") / "matrix.html.jinja").read_text("utf-8")
    )
    return template.render(matrix=matrix, costs=costs(matrix))


def costs(matrix: Matrix) -> list[str]:
    """What one base with adapters takes, compared with a full model for each."""
    count, mib = len(matrix.rows), 2**20
    adapters_disk, copies_disk = sum(row.disk for row in matrix.rows), matrix.base_disk * count
    text = [
        f"Memory: one base with {count} adapters {matrix.one_base / mib:.0f} MiB; {count} full models "
        f"{matrix.copies / mib:.0f} MiB ({matrix.copies / matrix.one_base:.1f} times as much).",
        f"Disk: {count} adapters {amount(adapters_disk)}, with their tokenizers; {count} full models "
        f"{amount(copies_disk)} ({copies_disk / max(1, adapters_disk):.1f} times as much).",
    ]
    loads = statistics.median(row.load_seconds for row in matrix.rows)
    median = matrix.switch_median
    switch = "" if median is None else f", a switch {1000 * median:.1f} ms (median of {len(matrix.switch_seconds)})"
    return [*text, f"Loading: the base {matrix.base_load_seconds:.2f} s, an adapter {loads:.2f} s{switch}."]


def _table(matrix: Matrix, measures: Mapping[str, str]) -> list[str]:
    width = max(len(row.name) for row in matrix.rows) + 2
    heads = [(task.name[:22], NAMES[measures[task.name]]) for task in matrix.tasks]
    cells = [[_shown(row, task, measures[task]) for task in measures] for row in matrix.rows]
    firsts = matrix.rows[0].cells
    base = [_number(firsts[task][kind].base, kind) for task, kind in measures.items()]
    columns = [max(len(a), len(b), len(base[n]), *(len(row[n]) for row in cells)) for n, (a, b) in enumerate(heads)]

    def line(first: str, values: Sequence[str]) -> str:
        return (
            first.ljust(max(width, 8)) + "  ".join(v.rjust(w) for v, w in zip(values, columns, strict=True))
        ).rstrip()

    return [
        line("", [a for a, _ in heads]),
        line("ADAPTER", [b for _, b in heads]),
        line("(base)", base),
        *(line(row.name, cells[n]) for n, row in enumerate(matrix.rows)),
    ]


def _shown(row: MatrixRow, task: str, measure: str) -> str:
    cell = row.cells[task][measure]
    mark = {"better": "better", "worse": "worse", "too few rows": "few"}.get(reading(cell), "")
    star = "*" if row.trained_on[task] else ""
    return f"{_number(cell.tuned, measure)} {_signed(cell.change, measure)} {mark:<6}{star or ' '}"


def _number(value: float, measure: str) -> str:
    return f"{value:.{2 if measure == LOSS else 1}f}"


def _signed(value: float, measure: str) -> str:
    return signed(value, 2 if measure == LOSS else 1)


def _shade(cell: Compared, measure: str, cells: Sequence[Compared]) -> int:
    """How deep a cell's colour is, 0 to 100: its change relative to the largest in its column."""
    largest = max((abs(other.change) for other in cells if math.isfinite(other.change)), default=0.0)
    return round(100 * abs(cell.change) / largest) if largest and math.isfinite(cell.change) else 0
