"""What a command that queues jobs says about their data, on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loractl.scheduler.cli.output import hint, warn

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec


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
