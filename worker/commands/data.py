"""loractl data: a job's rows as its tokenizer and chat template make them, and what looks wrong in them."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import ExitCode, UsageError
from loractl.common.job.file import load_spec
from loractl.common.job.spec import JobSpec
from loractl.common.text import clean_text
from loractl.worker.base.model import load_tokenizer
from loractl.worker.data.check import Checked, check_data
from loractl.worker.data.origin import dataset_hash
from loractl.worker.data.prepared import prepare_data
from loractl.worker.data.tokens import IGNORED, TokenRow

if TYPE_CHECKING:
    from loractl.common.data.findings import Finding

SHOWN_EXAMPLES = 3
SHOWN_LABELS = 20
BAR = 24
COLORS = {"error": "red", "warning": "yellow", "note": None}


@click.group()
def data() -> None:
    """Check a job's data, and look at them as the trainer sees them."""


@data.command("check")
@click.argument("job_file", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, like dataset.max_length=512."
)
@click.option("--gpu", metavar="SIZE", help="Recommend for a card of this size, like 24GiB; else the fleet's largest.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def data_check(job_file: Path, overrides: tuple[str, ...], gpu: str | None, as_json: bool) -> None:
    """Find what is wrong with a job's data before a GPU is touched.

    Through the model's own tokenizer and chat template: lengths, what max_length cuts, three examples with the tokens
    that are only given dimmed, and findings. Exits with 2 when the trainer would refuse the data.
    """
    spec = load_spec(job_file, overrides)
    room = _room(gpu)
    tokenizer = load_tokenizer(spec.base_model, spec.revision)
    checked = check_data(spec, tokenizer, _counted)
    advice = _advice(spec, checked, room)
    if as_json:
        click.echo(json.dumps(_as_json(checked, advice)))
    else:
        _print(spec, checked, tokenizer, advice)
    if checked.errors:
        sys.exit(ExitCode.USAGE)


@data.command("show")
@click.argument("job_file", type=click.Path(path_type=Path))
@click.option("--row", type=int, help="The row to show; without it the first that is trained on.")
@click.option("--json", "as_json", is_flag=True, help="Print the tokens as JSON.")
def data_show(job_file: Path, row: int | None, as_json: bool) -> None:
    """Show one training example, its learned tokens marked.

    On a terminal what is only given is dimmed; elsewhere what is learned stands in [[brackets]].
    """
    spec = load_spec(job_file)
    tokenizer = load_tokenizer(spec.base_model, spec.revision)
    prepared = prepare_data(
        spec.dataset, spec.dataset.path, spec.dataset.eval_path, dataset_hash(spec.dataset.path), tokenizer, None
    )
    rows = prepared.train.rows
    chosen = rows[0] if row is None else next((r for r in rows if r.number == row), None)
    if chosen is None:
        raise UsageError(
            f"row {row} is not trained on",
            f"rows of {spec.dataset.path} that are: {rows[0].number} to {rows[-1].number}, less those held out",
        )
    facts = prepared.facts()
    if as_json:
        learned = [label != IGNORED for label in chosen.labels]
        label = {} if chosen.label is None else {"label": prepared.label_names[chosen.label]}
        shown = {"row": chosen.number, "input_ids": chosen.input_ids, "learned": learned, **label, "data": facts}
        click.echo(json.dumps(shown))
        return
    click.echo(f"Row {chosen.number} of {spec.dataset.path}: {_size(chosen, prepared.label_names)}.")
    click.echo(
        f"Format {prepared.format.value}: {prepared.why}. "
        f"{facts['train_rows']} rows to train on, {facts['held_out_rows']} held out.\n"
    )
    click.echo(_marked(chosen, tokenizer))


def _print(spec: JobSpec, checked: Checked, tokenizer: Any, advice: list[str]) -> None:
    name = Path(spec.dataset.path).name
    if checked.format is not None:
        held = f", {checked.held_out_rows} held out" if checked.held_out_rows else ""
        rows = f": {checked.train_rows} rows to train on{held}" if checked.train_rows else ""
        click.echo(f"{name}{rows}. Format {checked.format.value}: {checked.why}.")
    if checked.lengths:
        click.echo("\nTOKENS      MIN  MEDIAN     P95     MAX")
        for label, one in (("a row", checked.lengths), ("learned", checked.learned)):
            if one is None:
                continue
            click.echo(f"{label:<9}{one.least:>6}{one.median:>8}{one.p95:>8}{one.most:>8}")
        click.echo()
        most = max(count for _, _, count in checked.histogram)
        for low, high, count in checked.histogram:
            cut = "  cut" if low > spec.dataset.max_length else ""
            bar = "█" * max(1 if count else 0, round(BAR * count / most))
            click.echo(f"{low:>6} to {high:<6} {bar:<{BAR}} {count:>6}{cut}")
    _print_labels(checked)
    for row in _examples(checked.rows):
        click.echo(f"\nRow {row.number}: {_size(row, list(checked.labels))}.\n")
        click.echo(textwrap.indent(_marked(row, tokenizer).rstrip("\n"), "  "))
    if checked.findings:
        click.echo()
    for finding in sorted(checked.findings, key=lambda f: list(COLORS).index(f.level)):
        _print_finding(finding)
    counts = [(n, word) for word in ("error", "warning") if (n := sum(f.level == word for f in checked.findings))]
    told = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts) or "Nothing wrong was found"
    click.echo(f"\n{told}.")
    for text in advice:
        click.echo(text)


def _print_labels(checked: Checked) -> None:
    """How often each of a classifier's labels is taught and held out."""
    if not checked.labels:
        return
    click.echo(f"\n{'LABEL':<24}{'TO TRAIN ON':>12}{'HELD OUT':>10}")
    most = sorted(checked.labels.items(), key=lambda item: -item[1]["train"])
    for name, rows in most[:SHOWN_LABELS]:
        click.echo(f"{clean_text(name)[:23]:<24}{rows['train']:>12}{rows['held_out']:>10}")
    if len(most) > SHOWN_LABELS:
        click.echo(f"and {len(most) - SHOWN_LABELS} more")


def _print_finding(finding: Finding) -> None:
    level = click.style(f"{finding.level:<8}", fg=COLORS[finding.level])
    click.echo(level + " " + clean_text(f"{finding.kind}: {finding.sentence}."))
    if finding.hint:
        click.echo(f"         Hint: {finding.hint}.")


def _advice(spec: JobSpec, checked: Checked, room: int | None) -> list[str]:
    """The max_length that cuts nothing, and the largest micro-batch that a card holds with it."""
    if checked.lengths is None:
        return []
    longest = max(checked.lengths.most, checked.longest_held_out)
    length = -(-longest // 64) * 64
    advice = [f"dataset.max_length: {length} holds the longest row, {longest} tokens."]
    fit = _largest_batch(spec, length, longest, checked, room) if room else None
    if fit:
        advice.append(fit)
    return advice


def _largest_batch(spec: JobSpec, length: int, longest: int, checked: Checked, room: int) -> str | None:
    from loractl.common.memory.architecture import read_shape
    from loractl.common.memory.plan import Lengths, largest_fit
    from loractl.common.placement.rule import permitted_methods
    from loractl.common.units import gib

    shape = read_shape(spec.base_model, spec.revision)
    if shape is None:
        return None
    wide = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"max_length": length})})
    labels = len(checked.labels) or None
    lengths = Lengths(train=longest, evaluate=checked.longest_held_out, rows=checked.train_rows, labels=labels)
    effective = spec.training.effective_batch
    for method in permitted_methods(spec.method):
        most = largest_fit(shape, wide, method, room, lengths).micro_batch
        if most:
            size = spec.training.micro_batch(most)
            return (
                f"In {gib(room)} GiB {method.value} takes up to {most} such rows at once; with the same {effective} "
                f"a step: per_device_train_batch_size: {size}, gradient_accumulation_steps: {effective // size}."
            )
    return f"Not one row of {longest} tokens fits into {gib(room)} GiB by the plan."


def _room(gpu: str | None) -> int | None:
    """Bytes of the card to recommend for: the given one, or the largest that has reported here."""
    from loractl.common.placement.rule import MARGIN_BYTES
    from loractl.common.settings import load_settings
    from loractl.common.units import parse_size

    if gpu is not None:
        try:
            return max(0, parse_size(gpu) - MARGIN_BYTES)
        except ValueError as error:
            raise UsageError(f"--gpu: {gpu!r} {error}") from None
    settings = load_settings()
    if settings.embedded_database and not settings.home.exists():
        return None  # a look at data makes no database
    from loractl.common.store.database import connect
    from loractl.common.store.store import Store

    cards = Store(connect(settings)).fleet().cards.values()
    return max((card.usable for card in cards if not card.processor), default=None)


def _examples(rows: list[TokenRow]) -> list[TokenRow]:
    """A short, a middling and a long row."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    places = sorted({0, len(ordered) // 2, len(ordered) - 1}) if ordered else []
    return [ordered[place] for place in places][:SHOWN_EXAMPLES]


def _size(row: TokenRow, label_names: Sequence[str]) -> str:
    if row.label is not None:
        return f"{len(row.input_ids)} tokens, label {clean_text(label_names[row.label])}"
    return f"{len(row.labels)} tokens, {sum(label != IGNORED for label in row.labels)} learned"


def _marked(row: TokenRow, tokenizer: Any) -> str:
    """The row's text; without colours the learned parts stand in brackets, so that a pipe tells the same."""
    learned = [label != IGNORED for label in row.labels]
    styled = sys.stdout.isatty()
    runs = _runs(row.input_ids, learned)
    return "".join(_mark(clean_text(tokenizer.decode(ids)), learn, styled) for ids, learn in runs)


def _runs(ids: list[int], learned: list[bool]) -> list[tuple[list[int], bool]]:
    """Neighbouring tokens of one kind, joined: a character may take several tokens."""
    joined: list[tuple[list[int], bool]] = []
    for token, learn in zip(ids, learned, strict=True):
        if not joined or joined[-1][1] != learn:
            joined.append(([], learn))
        joined[-1][0].append(token)
    return joined


def _mark(text: str, learn: bool, styled: bool) -> str:
    if styled:
        return click.style(text, dim=not learn, bold=learn)
    return f"[[{text}]]" if learn else text


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """The items, with a progress bar on a terminal where they are many."""
    known = list(items)
    if len(known) < 2000 or not sys.stderr.isatty():
        yield from known
        return
    with click.progressbar(known, label="Tokenising", file=sys.stderr) as bar:
        yield from bar


def _as_json(checked: Checked, advice: list[str]) -> dict[str, Any]:
    return {
        "ok": not checked.errors,
        "format": None if checked.format is None else checked.format.value,
        "why": checked.why,
        "train_rows": checked.train_rows,
        "held_out_rows": checked.held_out_rows,
        "tokens": None if checked.lengths is None else vars(checked.lengths),
        "labels": checked.labels or None,
        "learned_tokens": None if checked.learned is None else vars(checked.learned),
        "histogram": [{"from": low, "to": high, "rows": count} for low, high, count in checked.histogram],
        "findings": [vars(finding) for finding in checked.findings],
        "advice": advice,
    }
