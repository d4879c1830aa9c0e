"""loractl predict: an adapter's label or answer for every row of a file."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from loractl.common.errors import ExitCode, UsageError
from loractl.common.progress import progress_bar, working

from .terminal import answering, loading, tell, warn

if TYPE_CHECKING:
    from loractl.common.data.questions import Question
    from loractl.worker.serving.library import Library, Listed
    from loractl.worker.serving.prediction import Outcome

    Predict = Callable[[Iterable[Question]], Iterator[Outcome]]

ANSWER_OPTIONS = ("system", "tools", "max_new_tokens", "temperature", "top_p", "seed")
"""Options that a classifier can't use."""


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="OUT",
    help="Write the lines into this file, not to standard output.",
)  # fmt: skip
@answering
def predict(adapter: str, file: Path, output: Path | None, **style: Any) -> None:
    """Label or answer every row of a file, as JSON lines.

    A classifier gives "label" and "probability", other adapters give "answer". "row" is the row's line number in jsonl,
    else its position. FILE is jsonl, json, csv or parquet, with the columns of the adapter's training; answers in it
    are not read. All rows are checked before the base is loaded.
    """
    from loractl.common.data.questions import Questions
    from loractl.common.settings import load_settings
    from loractl.worker.serving.library import Library

    if output is not None:
        _check_output(output, file)
    library = Library(load_settings(), warn)
    listed = library.find_any(adapter)
    writes = listed.spec.kind.writes
    context = click.get_current_context()
    given = [name for name in ANSWER_OPTIONS if context.get_parameter_source(name) is not _DEFAULT]
    if given and not writes:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} is for answers, and {listed.name} is a classifier", "leave it out")
    read = partial(Questions, file, listed.spec.dataset, library.format(listed))
    with progress_bar() as report:
        rows = sum(1 for _ in read(partial(report, "Reading rows")))
    opened = _answerer(library, adapter, style) if writes else _classifier(library, listed, style["gpu"])
    failed = write_outcomes(opened(read()), rows, output)
    if output is not None:
        tell(f"{output}: {rows} row{'' if rows == 1 else 's'}.")
    if failed:
        told = "has no answer: its line says" if failed == 1 else "have no answer: their lines say"
        click.echo(f"{failed} of {rows} rows {told} why.", err=True)
        sys.exit(ExitCode.FAILED)


_DEFAULT = click.core.ParameterSource.DEFAULT


def _check_output(output: Path, file: Path) -> None:
    """Raises UsageError before anything is loaded."""
    if not output.parent.is_dir():
        raise UsageError(f"--output: there is no folder {output.parent}", "make it first")
    if output.exists() and output.samefile(file):
        raise UsageError(f"--output: {output} is the file of the rows", "name another file")


def _classifier(library: Library, listed: Listed, gpu: str | None) -> Predict:
    loading(listed.name)
    from loractl.worker.serving.prediction import open_classifier

    return open_classifier(library, listed, gpu, tell, warn).label_rows


def _answerer(library: Library, adapter: str, style: dict[str, Any]) -> Predict:
    loading(adapter)
    from loractl.worker.serving.conversation import Style, open_conversation
    from loractl.worker.serving.prediction import answer_rows

    conversation = open_conversation(library, adapter, Style(**style), tell, warn)
    return lambda questions: answer_rows(conversation, questions)


def write_outcomes(outcomes: Iterator[Outcome], rows: int, output: Path | None) -> int:
    """Write one line per outcome as it comes; returns how many rows failed."""
    failed = 0
    quiet = output is None and sys.stdout.isatty()  # on a terminal, the lines themselves show the progress
    bar = contextlib.nullcontext(lambda done: None) if quiet else working("Rows", rows)
    with _lines(output, rows) as lines, bar as report:
        for done, outcome in enumerate(outcomes, start=1):
            lines.write(json.dumps(outcome.as_json(), ensure_ascii=False) + "\n")
            failed += outcome.error is not None
            report(done)
    return failed


@contextlib.contextmanager
def _lines(output: Path | None, rows: int) -> Iterator[TextIO]:
    """Where the lines go. A file gets its name only when it is complete, so that half of it never passes for all. If
    the work is interrupted, reports which part is left."""
    if output is None:
        yield sys.stdout
        return
    part = output.with_name(f"{output.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
    except BaseException:  # Ctrl-C too
        with part.open(encoding="utf-8") as file:
            done = sum(1 for _ in file)
        if done:
            tell(f"Interrupted after {done} of {rows} rows; {part} has them.")
        else:
            part.unlink()
        raise
    part.replace(output)
