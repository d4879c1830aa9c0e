"""loractl sweep: one job file with different settings, as a group of jobs. Losers may be stopped early."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loractl.scheduler.cli.named import Setting
from loractl.scheduler.cli.output import hint, show, warn
from loractl.scheduler.submit.warnings import warn_of_data, warn_of_keys

if TYPE_CHECKING:
    from loractl.common.settings import Settings

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
    from loractl.scheduler.cli.screen import detect_screen
    from loractl.scheduler.submit.preflight import check_addresses

    from .answer import sweep_draft
    from .text import draft_text

    settled = check_addresses()
    draft = sweep_draft(job_file, settings, trials=trials, seed=seed, early_stop=early_stop)
    if dry_run:
        _check(draft, job_file, settled)
        show(draft, as_json, lambda: draft_text(draft, detect_screen()))
    else:
        _queue(draft, job_file, as_json)


def _check(draft: SweepDraft, job_file: Path, settings: Settings) -> None:
    """Sweep's checks before it queues, with nothing written; it prints what is doubtful."""
    from loractl.scheduler.cli.session import open_to_check
    from loractl.scheduler.submit.intake import doubts_of, too_large, with_own_channels

    from .answer import planned

    store, unknown = open_to_check(settings)
    _warn_of_files(draft, job_file)
    doubts = _doubts(draft, settings)
    members = planned([with_own_channels(spec, settings) for spec in draft.specs], settings, store)
    largest = max(members, key=lambda member: member.first_need or 0)
    name = largest.spec.name
    doubts += [*doubts_of(name, largest, settings), *too_large(name, largest, store), *([unknown] if unknown else [])]
    warn(dict.fromkeys(doubts))


def _warn_of_files(draft: SweepDraft, job_file: Path) -> None:
    from .answer import with_different_data

    warn_of_keys(draft.specs)
    for spec in with_different_data(draft.specs):
        warn_of_data(spec, job_file)


def _doubts(draft: SweepDraft, settings: Settings) -> list[str]:
    from loractl.scheduler.submit.overflow import check_overflow, unchecked
    from loractl.scheduler.submit.preflight import check_model

    from .answer import with_different_bases, with_different_data

    doubts = [line for spec in with_different_bases(draft.specs) for line in check_model(spec, settings)]
    for spec in with_different_data(draft.specs):
        doubts += unchecked(check_overflow(spec, lambda: hint("Counting tokens ...")))
    return doubts


def _queue(draft: SweepDraft, job_file: Path, as_json: bool) -> None:
    from loractl.scheduler.cli.screen import detect_screen
    from loractl.scheduler.cli.session import open_stores
    from loractl.scheduler.status.standing import SweepStanding
    from loractl.scheduler.submit.intake import enqueue_sweep, with_own_channels

    from .answer import submissions
    from .text import queued_text

    settings, store, artifacts = open_stores()
    _warn_of_files(draft, job_file)
    warn(dict.fromkeys(_doubts(draft, settings)))
    specs = [with_own_channels(spec, settings) for spec in draft.specs]
    members = submissions(specs, settings, store, artifacts)
    sweep, warnings = enqueue_sweep(draft, members, settings, store)
    show(SweepStanding(sweep=sweep), as_json, lambda: queued_text(sweep, detect_screen()))
    warn(warnings)
    if not as_json:
        hint(f"Follow it: loractl status --sweep {sweep.sweep_id}")
