"""loractl matrix: several adapters on several tasks, all on one loaded base, beside what full copies would cost."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import UsageError
from loractl.common.text import signed

if TYPE_CHECKING:
    from loractl.worker.serving.adapter_pool import Resident
    from loractl.worker.serving.library import Library, Listed
    from loractl.worker.serving.scores import Cell, Task

SWITCHES = 60
"""So many switches are timed."""

MIN_CASES = 8
"""Fewer rows are too few for an interval."""

NAMES = {"loss": "loss, nats", "accuracy": "accuracy, %", "rougeL": "ROUGE-L, %"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One adapter: its cells by task and measure, and how many of a task's rows it was trained on."""

    name: str
    job_id: int
    method: str
    cells: dict[str, dict[str, Cell]]
    trained_on: dict[str, int]
    load_seconds: float
    memory: int
    disk: int


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Everything that was measured. Bytes and seconds."""

    base_model: str
    precision: str
    tasks: list[Task]
    lines: list[Line]
    base_memory: int
    base_disk: int
    base_load_seconds: float
    switch_seconds: list[float]

    @property
    def one_base(self) -> int:
        """Memory of one base with all adapters."""
        return self.base_memory + sum(line.memory for line in self.lines)

    @property
    def copies(self) -> int:
        """Memory of a full model for each adapter, as merged ones have."""
        return self.base_memory * len(self.lines)


@click.command()
@click.option("--adapters", required=True, metavar="LIST", help="Adapters of one base, like support,notebook:prod,12.")
@click.option("--data", metavar="LIST", help="Tasks as NAME=FILE,...; else the rows that each adapter's job held out.")
@click.option(
    "--rows", type=click.IntRange(1), default=200, show_default=True, metavar="N", help="At most so many a task."
)
@click.option(
    "--samples",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    metavar="N",
    help="Answers generated a task, where they are no labels.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="N",
    help="An answer ends there at the latest.",
)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Rows at a time.")
@click.option("--load-in-4bit", is_flag=True, help="The base in NF4, as QLoRA trains it.")
@click.option("--gpu", metavar="CARD", help="Use this card, by index or UUID; else the first, or the CPU.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the heat map into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def matrix(html: Path | None, as_json: bool, **options: Any) -> None:
    """Score several adapters on several tasks, on one loaded base.

    Each cell is compared with the base on the same rows. Also: how long a switch takes, and memory and disk of one base
    with adapters against full copies.
    """
    from loractl.common.settings import load_settings
    from loractl.worker.serving.library import Library

    if html is not None and not html.absolute().parent.is_dir():
        raise UsageError(f"{html} can't be written: there is no such folder", "name a file in a folder that exists")
    found = measure(Library(load_settings()), Asked(**options))
    if html is not None:
        html.write_text(page(found), "utf-8")
        click.echo(f"The heat map is in {html}.", err=True)
    click.echo(json.dumps(as_dict(found)) if as_json else "\n".join(lines(found)))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's options."""

    adapters: str
    data: str | None = None
    rows: int = 200
    samples: int = 32
    max_new_tokens: int = 64
    batch: int = 16
    load_in_4bit: bool = False
    gpu: str | None = None


def measure(library: Library, asked: Asked) -> Matrix:
    """Load the base once, and score it and every adapter on every task. Raises LoractlError."""
    from loractl.common.job.method import Method
    from loractl.worker.serving.adapter_pool import Base, open_resident
    from loractl.worker.serving.library import same_base
    from loractl.worker.serving.scores import asked_for, compare, score, task_from_file, task_of

    from .chat import take_device, warn_of_other_base

    named = _named(asked.adapters, library)
    files_of = _files(asked.data)
    model, _ = same_base(list(named.values()))
    first = next(iter(named.values()))
    base = Base(
        model=model,
        revision=library.revision(first),
        method=Method.QLORA if asked.load_in_4bit else Method.LORA,
        device=take_device(library, asked.gpu),
        run_code=library.may_run_code(first),
    )
    resident = open_resident(base, tell=_tell)
    warn_of_other_base(library, list(named.values()))
    tokenizer, wanted = resident.tokenizer, asked_for(asked.rows, asked.samples, asked.max_new_tokens, asked.batch)
    own = {name: task_of(name, listed, library, tokenizer, wanted) for name, listed in named.items()}
    tasks = [task for task, _ in own.values()]
    if files_of:
        tasks = [task_from_file(name, path, tokenizer, wanted) for name, path in files_of.items()]
    folders = {name: library.fetch(listed) for name, listed in named.items()}
    loaded = {name: resident.hold(listed, folders[name]) for name, listed in named.items()}
    bases = {task.name: score(resident, None, task, wanted) for task in _told(tasks, "the base")}
    found = []
    for name, listed in named.items():
        scores = {task.name: score(resident, loaded[name].key, task, wanted) for task in _told(tasks, name)}
        found.append(
            Line(
                name=name,
                job_id=listed.job_id,
                method=listed.method.value,
                cells={
                    task.name: {
                        kind: compare(bases[task.name], scores[task.name], kind)
                        for kind in dict.fromkeys(("loss", task.measure))
                    }
                    for task in tasks
                },
                trained_on={task.name: sum(one in own[name][1] for one in task.hashes) for task in tasks},
                load_seconds=loaded[name].seconds,
                memory=loaded[name].size,
                disk=_bytes_below(folders[name]),
            )
        )
    return Matrix(
        base_model=model,
        precision="NF4" if asked.load_in_4bit else str(resident.precision.base).removeprefix("torch."),
        tasks=tasks,
        lines=found,
        base_memory=resident.bytes,
        base_disk=_disk_of(model, base.revision),
        base_load_seconds=resident.seconds,
        switch_seconds=_switches(resident, [one.key for one in loaded.values()]),
    )


def _tell(text: str) -> None:
    click.echo(click.style(text, dim=True), err=True)


def _told(tasks: Sequence[Task], who: str) -> Iterator[Task]:
    for task in tasks:
        began = time.monotonic()
        yield task
        _tell(f"{who} on {task.name}: {len(task.work.rows)} rows in {time.monotonic() - began:.0f} s")


def _named(text: str, library: Library) -> dict[str, Listed]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(set(parts)) < len(parts) or not parts:
        raise UsageError("--adapters names none, or one twice", "like --adapters support,notebook:prod,12")
    return {part: library.find(part) for part in parts}


def _files(text: str | None) -> dict[str, Path]:
    """--data faq=faq.jsonl,mail=mail.jsonl. Raises UsageError."""
    found: dict[str, Path] = {}
    for part in (part.strip() for part in (text or "").split(",") if part.strip()):
        name, equals, path = part.partition("=")
        if not equals or not name or name in found:
            raise UsageError(
                f"--data: {part!r} is not of the form NAME=FILE, or its name is taken", "like faq=faq.jsonl"
            )
        found[name] = Path(path)
    return found


def _switches(resident: Resident, keys: Sequence[str]) -> list[float]:
    """Seconds of single switches between the loaded adapters, in turn."""
    took = []
    for number in range(SWITCHES if len(keys) > 1 else 0):
        began = time.perf_counter()
        resident.switch(keys[number % len(keys)])
        took.append(time.perf_counter() - began)
    return took[1:]  # the first may have been no switch


def _disk_of(model: str, revision: str | None) -> int:
    """Bytes of the base's weights where they lie: a folder, or the hub's cache."""
    from transformers.utils import cached_file

    folder = Path(model)
    if not folder.is_dir():
        folder = Path(str(cached_file(model, "config.json", revision=revision))).parent
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return sum(path.stat().st_size for path in weights)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def reading(cell: Cell, measure: str) -> str:
    """better, worse, no clear change, or too few rows: by whether the interval of the change leaves out zero."""
    if cell.cases < MIN_CASES:
        return "too few rows"
    if not all(map(math.isfinite, (cell.low, cell.high))) or cell.low <= 0 <= cell.high:
        return "no clear change"
    return "better" if (cell.change > 0) == (measure != "loss") else "worse"


def as_dict(found: Matrix) -> dict[str, Any]:
    """All of it for programs; what is no number is null."""
    return {
        "base_model": found.base_model,
        "precision": found.precision,
        "tasks": [{"name": t.name, "rows": len(t.work.rows), "measure": t.measure} for t in found.tasks],
        "adapters": [
            {
                "name": line.name,
                "job_id": line.job_id,
                "method": line.method,
                "load_seconds": line.load_seconds,
                "memory_bytes": line.memory,
                "disk_bytes": line.disk,
                "tasks": {
                    name: {kind: _cell(cell, kind) for kind, cell in cells.items()}
                    for name, cells in line.cells.items()
                },
                "rows_trained_on": line.trained_on,
            }
            for line in found.lines
        ],
        "memory_bytes": {"base": found.base_memory, "one_base": found.one_base, "copies": found.copies},
        "disk_bytes": {"base": found.base_disk, "adapters": sum(line.disk for line in found.lines)},
        "base_load_seconds": found.base_load_seconds,
        "switch_seconds": {"median": _median(found.switch_seconds), "count": len(found.switch_seconds)},
    }


def _cell(cell: Cell, measure: str) -> dict[str, Any]:
    numbers = {**vars(cell), "change": cell.change}
    shown = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in numbers.items()}
    return {**shown, "reading": reading(cell, measure)}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def lines(found: Matrix) -> list[str]:
    """The tables for a terminal: answers, then losses, then what it costs."""
    name = found.base_model.rpartition("/")[2]
    text = [f"{len(found.lines)} adapters on {name} ({found.precision}), {len(found.tasks)} tasks.", ""]
    answers = {task.name: task.measure for task in found.tasks}
    text += _table(found, answers)
    if set(answers.values()) != {"loss"}:
        text += ["", *_table(found, dict.fromkeys(answers, "loss"))]
    if any(count for line in found.lines for count in line.trained_on.values()):
        text += ["", "* trained on rows of this task: no measure of what it has learned."]
    text += ["", *costs(found)]
    return text


def _table(found: Matrix, measures: Mapping[str, str]) -> list[str]:
    width = max(len(line.name) for line in found.lines) + 2
    heads = [(task.name[:22], NAMES[measures[task.name]]) for task in found.tasks]
    cells = [[_shown(line, task, measures[task]) for task in measures] for line in found.lines]
    firsts = found.lines[0].cells
    base = [_number(firsts[task][kind].base, kind) for task, kind in measures.items()]
    columns = [max(len(a), len(b), len(base[n]), *(len(row[n]) for row in cells)) for n, (a, b) in enumerate(heads)]

    def row(first: str, values: Sequence[str]) -> str:
        return (
            first.ljust(max(width, 8)) + "  ".join(v.rjust(w) for v, w in zip(values, columns, strict=True))
        ).rstrip()

    return [
        row("", [a for a, _ in heads]),
        row("ADAPTER", [b for _, b in heads]),
        row("(base)", base),
        *(row(line.name, cells[n]) for n, line in enumerate(found.lines)),
    ]


def _shown(line: Line, task: str, measure: str) -> str:
    cell = line.cells[task][measure]
    mark = {"better": "better", "worse": "worse", "no clear change": "", "too few rows": "few"}[reading(cell, measure)]
    star = "*" if line.trained_on[task] else ""
    return f"{_number(cell.value, measure)} {_signed(cell.change, measure)} {mark:<6}{star or ' '}"


def _number(value: float, measure: str) -> str:
    return f"{value:.{2 if measure == 'loss' else 1}f}"


def _signed(value: float, measure: str) -> str:
    return signed(value, 2 if measure == "loss" else 1)


def costs(found: Matrix) -> list[str]:
    """What one base with adapters takes, beside a full model for each."""
    count, mib = len(found.lines), 2**20
    adapters_disk, copies_disk = sum(line.disk for line in found.lines), found.base_disk * count
    text = [
        f"Memory: one base with {count} adapters {found.one_base / mib:.0f} MiB; {count} full models "
        f"{found.copies / mib:.0f} MiB ({found.copies / found.one_base:.1f} times as much).",
        f"Disk: {count} adapters {adapters_disk / 1e6:.0f} MB, with their tokenizers; {count} full models "
        f"{copies_disk / 1e6:.0f} MB ({copies_disk / max(1, adapters_disk):.1f} times as much).",
    ]
    loads = statistics.median(line.load_seconds for line in found.lines)
    median = _median(found.switch_seconds)
    switch = "" if median is None else f", a switch {1000 * median:.1f} ms (median of {len(found.switch_seconds)})"
    return [*text, f"Loading: the base {found.base_load_seconds:.2f} s, an adapter {loads:.2f} s{switch}."]


def page(found: Matrix) -> str:
    """The heat map: no script, no font, no picture from elsewhere."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(reading=reading, number=_number, signed=_signed, names=NAMES, shade=_shade)
    template = environment.from_string((files("loractl.worker.serving") / "matrix.html.jinja").read_text("utf-8"))
    return template.render(found=found, costs=costs(found))


def _shade(cell: Cell, measure: str, cells: Sequence[Cell]) -> int:
    """How deep a cell's colour is, 0 to 100: its change against the largest of its column."""
    largest = max((abs(other.change) for other in cells if math.isfinite(other.change)), default=0.0)
    return round(100 * abs(cell.change) / largest) if largest and math.isfinite(cell.change) else 0
