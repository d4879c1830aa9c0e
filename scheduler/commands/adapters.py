"""loractl adapters: the stored adapters, what people call them, and where each comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.common.text import clean_line
from loractl.common.units import clock
from loractl.scheduler.lazy import Commands, LazyGroup
from loractl.scheduler.text import screen as render
from loractl.scheduler.text.screen import Screen, fit

if TYPE_CHECKING:
    import datetime as dt

    from loractl.common.artifacts import ArtifactStore
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Adapter, Job

COMMANDS: Commands = {
    "merge": (
        "loractl.worker.commands.merge:merge",
        "Make a full model of base and adapter, and prove that it is the same.",
    ),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def adapters(ctx: click.Context, as_json: bool) -> None:
    """Look after the stored adapters: list, tag, pull, merge, delete.

    ADAPTER is a job's number (12), a job's name for the newest of that name (support, the same as support:latest), or a
    name and a tag (support:prod).
    """
    if ctx.invoked_subcommand is None:
        _list(as_json)


@adapters.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def adapters_list(as_json: bool) -> None:
    """List them with their tags."""
    _list(as_json)


@adapters.command("show")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def adapters_show(adapter: str, as_json: bool) -> None:
    """Show where an adapter comes from: base, data, job, versions."""
    from loractl.common.job.reference import LATEST

    row, job, files, prefix, store = _open(adapter)
    tags = store.tags().get(row.job_id, [])
    report = files.read_json(prefix, "report.json")
    if as_json:
        click.echo(json.dumps(_lineage(row, job, tags, report)))
        return
    names = [f"{clean_line(row.name)}:{tag}" for tag in tags if tag != LATEST]
    click.echo(_shown(row, job, names, report, store.now()))


@adapters.command("tag")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("tag", metavar="TAG")
def adapters_tag(adapter: str, tag: str) -> None:
    """Let NAME:TAG mean this adapter; loractl gc keeps it."""
    from loractl.common.job.reference import check_tag, parse_reference
    from loractl.scheduler.session import open_session

    check_tag(tag)
    settings, store = open_session()
    row, before = store.tag(parse_reference(adapter), tag, settings.user)
    moved = f"; it was job {before}" if before not in (None, row.job_id) else ""
    click.echo(f"{clean_line(row.name)}:{tag} is the adapter of job {row.job_id} now{moved}.")


@adapters.command("untag")
@click.argument("name", metavar="NAME:TAG")
def adapters_untag(name: str) -> None:
    """Forget a tag; the adapter stays."""
    from loractl.common.errors import UsageError
    from loractl.common.job.reference import check_tag, parse_reference
    from loractl.scheduler.session import open_session

    reference = parse_reference(name)
    if reference.name is None or ":" not in name:
        raise UsageError(f"{name!r} is not of the form NAME:TAG", "like support:prod")
    check_tag(reference.tag)
    settings, store = open_session()
    click.echo(f"{reference} is forgotten; it was job {store.untag(reference, settings.user)}.")


@adapters.command("pull")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
def adapters_pull(adapter: str, folder: Path) -> None:
    """Copy an adapter into a new folder, verified.

    peft's PeftModel.from_pretrained loads it from there.
    """
    from loractl.common.errors import UsageError

    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "name a new folder")
    row, job, files, prefix, _ = _open(adapter)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} can't be made: {error.strerror}") from error
    pulled = files.pull(prefix, "adapter/", folder)
    size = sum(file.size for file in pulled.values())
    click.echo(f"The adapter of job {row.job_id} ({len(pulled)} files, {size / 1e6:.1f} MB) is in {folder}.")
    if job.spec.get("task_type") == "SEQ_CLS":  # its base needs the head and its labels first
        click.echo(f"How to load the classifier: {folder}/README.md", err=True)
        return
    click.echo(f"Load it on {clean_line(row.base_model)}:  PeftModel.from_pretrained(base, {str(folder)!r})", err=True)


@adapters.command("delete")
@click.argument("names", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def adapters_delete(names: tuple[str, ...], yes: bool) -> None:
    """Remove adapters for good, with their reports; a tagged one is refused."""
    from loractl.common.errors import WrongState
    from loractl.common.job.reference import set_by_hand

    opened = list({found[0].job_id: found for found in map(_open, names)}.values())
    for row, job, _, _, store in opened:
        if tags := set_by_hand(store.tags(), row.job_id):
            hint = f"first: loractl adapters untag {job.name}:{tags[0]}"
            raise WrongState(f"the adapter of job {row.job_id} is tagged {job.name}:{tags[0]}", hint)
    what = ", ".join(f"{clean_line(row.name)} (job {row.job_id}, {row.size / 1e6:.1f} MB)" for row, *_ in opened)
    if not yes:
        click.confirm(f"Remove {what} with its report, for good?", abort=True, err=True)
    from loractl.scheduler.session import open_session

    settings, _ = open_session()
    for row, job, files, prefix, store in opened:
        if not store.remove_result(row.job_id, settings.user, "loractl adapters delete"):
            raise WrongState(f"the adapter of job {row.job_id} was removed or tagged by somebody else just now")
        files.remove(prefix)
        click.echo(f"The adapter of job {row.job_id} ({clean_line(job.name)}) is removed.")


def _open(text: str) -> tuple[Adapter, Job, ArtifactStore, str, Store]:
    """The adapter that a person means, its job, and where its files are. Raises WrongState, naming why none is left."""
    from loractl.common.artifacts import attempt_prefix, open_store
    from loractl.common.errors import AdapterNotFound
    from loractl.common.job.reference import parse_reference
    from loractl.scheduler.session import open_session

    from .report import result_of

    reference = parse_reference(text)
    settings, store = open_session()
    try:
        row = store.adapter(reference)
    except AdapterNotFound:
        if reference.job_id is not None:
            result_of(reference.job_id)  # says what became of it
        raise
    job = store.job(row.job_id)
    return row, job, open_store(settings), attempt_prefix(row.job_id, row.attempt), store


def _list(as_json: bool) -> None:
    from loractl.scheduler.session import open_session

    _, store = open_session()
    found, tags = store.adapters(), store.tags()
    if as_json:
        rows = [_row(a, tags.get(a.job_id, [])) for a in found]
        click.echo(json.dumps(rows))
        return
    click.echo(adapter_table(found, tags, store.now(), render.detect_screen()))


def _row(adapter: Adapter, tags: Sequence[str]) -> dict[str, Any]:
    fields = {c.key: getattr(adapter, c.key) for c in adapter.__table__.columns}
    return {**fields, "created_at": adapter.created_at.isoformat(), "tags": list(tags)}


def adapter_table(found: Sequence[Adapter], tags: Mapping[int, Sequence[str]], now: dt.datetime, screen: Screen) -> str:
    """The stored adapters."""
    if not found:
        return "No adapter is stored yet; a job that succeeds stores one."
    rows = [
        [
            str(a.job_id),
            screen.style(fit(a.name, 24), bold=True),
            fit(", ".join(tags.get(a.job_id, ())), 20),
            a.method,
            f"{a.size / 1e6:.1f}",
            clock(a.created_at, now),
            fit(a.base_model.rpartition("/")[2], 30),
        ]
        for a in found
    ]
    head = ["JOB", "NAME", "TAGS", "METHOD", "MB", "STORED", "BASE MODEL"]
    lines = render.table(head, rows, screen, right=("JOB", "MB", "STORED"))
    return "\n".join([*lines, "", screen.dim(f"Use one: loractl adapters pull {found[-1].job_id} DIR")])


def _lineage(row: Adapter, job: Job, tags: Sequence[str], report: Mapping[str, Any]) -> dict[str, Any]:
    data = report["data"]
    return {
        **_row(row, tags),
        "user": job.user,
        "revision": job.spec.get("revision"),
        "lora": job.spec["lora"],
        "data": {key: data[key] for key in ("format", "sha256", "train_rows", "held_out_rows")},
        "verdict": report["verdict"],
        "versions": report["versions"],
    }


def _shown(row: Adapter, job: Job, names: Sequence[str], report: Mapping[str, Any], now: dt.datetime) -> str:
    adapter, data = report["adapter"], report["data"]
    revision = f", revision {job.spec['revision']}" if job.spec.get("revision") else ""
    parts = [
        (
            "made by",
            f"job {row.job_id}, attempt {row.attempt}, of {clean_line(job.user)}, {clock(row.created_at, now)}",
        ),
        ("base", f"{clean_line(row.base_model)}{revision}"),
        (
            "shape",
            f"{row.method}, r {adapter['r']}, lora_alpha {adapter['lora_alpha']:g}: {', '.join(adapter['modules'])}",
        ),
        ("data", f"{data['train_rows']} rows ({data['format']}), sha256 {data['sha256'] or 'unknown: from the hub'}"),
        ("result", clean_line(report["verdict"]["sentence"])),
        ("weights", f"{row.size / 1e6:.1f} MB, sha256 {adapter['sha256']}"),
        ("files", clean_line(row.uri)),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    ]
    head = f"{clean_line(row.name)} (job {row.job_id})" + (f", tagged {', '.join(names)}" if names else "")
    return "\n".join([head, "", *(f"{name:<9} {clean_line(text)}" for name, text in parts)])
