"""What a command that queues jobs says about their keys and their data, on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loractl.scheduler.cli.output import hint, warn

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec


def warn_of_keys(specs: Iterable[JobSpec]) -> None:
    """Print a warning about a key of these jobs that has no effect any more."""
    if any(spec.resources.exclusive for spec in specs):
        what = "resources.exclusive has no effect: every job trains in a process of its own"
        warn([f"Warning: {what}. Remove it; a later version refuses it."])


def warn_of_data(spec: JobSpec, job_file: Path | None) -> None:
    """Check the job's local data, and print warnings about what looks wrong in them. Raises DataError."""
    from loractl.common.progress import progress_bar
    from loractl.common.text import clean_line

    from .data import check_used_data

    with progress_bar() as report:
        findings, note = check_used_data(spec, report)
    warnings = [finding for finding in findings if finding.level == "warning"]
    warn([note] if note else [])
    told = [finding for finding in findings if finding.kind in ("several data sets", "fields that are not read")]
    name = "dataset" if spec.dataset.more else Path(spec.dataset.path).name
    warn(clean_line(f"Note: {name}: {finding.sentence}.") for finding in told)
    warn(clean_line(f"Warning: {name}: {finding.sentence}.") for finding in warnings)
    if warnings and job_file is not None:
        hint(f"See the data: loractl data check {job_file}")
