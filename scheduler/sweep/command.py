"""loractl sweep: one job file with different settings, as a group of jobs. Losers may be stopped early."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.scheduler.cli.named import Setting
from loractl.scheduler.cli.output import hint, show, warn
from loractl.scheduler.cli.screen import Screen, detect_screen, number_columns, table
from loractl.scheduler.cli.session import open_artifacts, open_stores, open_to_check
from loractl.scheduler.status.standing import shares, short_setting

if TYPE_CHECKING:
    from loractl.common.job.sweep import SweepView
    from loractl.common.settings import Settings
    from loractl.scheduler.submit.draft import JobDraft

    from .answer import SweepDraft


@click.command()
@click.argument("job_file", type=click.Path(path_type=Path))
@click.option(
    "--set", "settings", multiple=True, type=Setting(), metavar="KEY=VALUES",
    help="Values to try, like lora.r=8,16,32, or a range to draw from: log:1e-5..1e-3, uniform:0..0.1, int:4..64.",
)  # fmt: skip
@click.option("--early-stop", is_flag=True, help="Stop members that lose at 25 % and at 50 % of their steps.")
@click.option("--trials", type=click.IntRange(2), metavar="N", help="Draw N points instead of running all.")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="The seed of the draw; 0 by default.")
@click.option("--dry-run", is_flag=True, help="Check and print the members, and queue nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sweep(
    job_file: Path,
    settings: tuple[str, ...],
    early_stop: bool,
    trials: int | None,
    seed: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Try several settings of a job file; losers may stop early.

    Every member is checked before any is queued, and all are queued or none. One value alone holds for all members.
    """
    from loractl.scheduler.submit.preflight import check_addresses

    from .answer import sweep_draft

    settled = check_addresses()
    draft = sweep_draft(job_file, settings, trials=trials, seed=seed, early_stop=early_stop)
    if dry_run:
        _check(draft, job_file, settled)
        show(draft, as_json, lambda: _draft_text(draft, detect_screen()))
    else:
        _queue(draft, job_file, as_json)


def _check(draft: SweepDraft, job_file: Path, settings: Settings) -> None:
    """Sweep's checks before it queues, with nothing written; it prints what is doubtful."""
    from loractl.scheduler.submit.admission import check_all
    from loractl.scheduler.submit.intake import doubts_of, too_large

    (store, unknown), artifacts = open_to_check(settings), open_artifacts(settings, None)
    members, doubts = check_all(_drafts(draft, job_file), settings, store, artifacts, members=True)
    largest = max(members, key=lambda member: member.first_need or 0)
    name = largest.spec.name
    doubts += [*doubts_of(name, largest, settings), *too_large(name, largest, store), *([unknown] if unknown else [])]
    warn(dict.fromkeys(doubts))


def _drafts(draft: SweepDraft, job_file: Path) -> list[JobDraft]:
    from loractl.scheduler.submit.draft import JobDraft

    return [JobDraft(spec=spec, job_file=job_file) for spec in draft.specs]


def _queue(draft: SweepDraft, job_file: Path, as_json: bool) -> None:
    from loractl.scheduler.status.standing import SweepStanding
    from loractl.scheduler.submit.admission import check_all
    from loractl.scheduler.submit.intake import enqueue_sweep, store_all

    settings, store, artifacts = open_stores()
    drafts = _drafts(draft, job_file)
    planned, doubts = check_all(drafts, settings, store, artifacts, members=True)
    warn(dict.fromkeys(doubts))
    sweep, warnings = enqueue_sweep(draft, store_all(drafts, planned, artifacts), settings, store)
    show(SweepStanding(sweep=sweep), as_json, lambda: _queued_text(sweep, detect_screen()))
    warn(warnings)
    if not as_json:
        hint(f"Follow it: loractl status --sweep {sweep.sweep_id}")


def _queued_text(view: SweepView, screen: Screen) -> str:
    """A sentence that the members are queued, and the drawn points."""
    jobs = listed([member.job_id for member in view.members])
    losers = f"; losers stop after {shares(view.rungs)} of their steps" if view.rungs else ""
    lines = [f"Sweep {view.sweep_id}: {len(view.members)} jobs ({jobs}) are queued{losers}."]
    if view.trials is not None:
        members = [(str(member.job_id), member.settings) for member in view.members]
        lines += ["", f"Drawn with seed {view.seed}:", *_points("JOB", members, screen)]
    return "\n".join(lines)


def _draft_text(answer: SweepDraft, screen: Screen) -> str:
    """The members that would be queued."""
    drawn = "" if answer.trials is None else f", drawn with seed {answer.seed}"
    losers = f" Losers would stop after {shares(answer.rungs)} of their steps." if answer.rungs else ""
    lines = [*_points("NAME", answer.points, screen), ""]
    return "\n".join([*lines, f"{len(answer.specs)} jobs{drawn}; none is queued.{losers}"])


def listed(job_ids: Sequence[int]) -> str:
    """12, 13, 14 as "12 to 14"; numbers with gaps one by one."""
    if len(job_ids) > 2 and all(b == a + 1 for a, b in itertools.pairwise(job_ids)):
        return f"{job_ids[0]} to {job_ids[-1]}"
    return ", ".join(map(str, job_ids))


def _points(first: str, members: Sequence[tuple[str, Mapping[str, Any]]], screen: Screen) -> list[str]:
    """The settings of each member, below the line `first`."""
    headers = [first, *members[0][1]]
    rows = [[name, *map(short_setting, settings.values())] for name, settings in members]
    return table(headers, rows, screen, right=number_columns(headers, rows))
