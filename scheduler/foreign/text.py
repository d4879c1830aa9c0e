"""An imported configuration as a job file, and the account of its settings for a terminal."""

from __future__ import annotations

from pathlib import Path

import yaml

from loractl.common.text import clean_line

from .configuration import Imported


def job_file(imported: Imported, file: Path) -> str:
    """The job file, which says where it comes from."""
    left = clean_line(", ".join(sorted(imported.left_out))) or "nothing"
    head = f"# From {imported.tool}'s {clean_line(file.name)}, by loractl import. Not carried: {left}.\n"
    return head + yaml.safe_dump(imported.job, sort_keys=False, allow_unicode=True)


def account(imported: Imported, file: Path, output: Path | None) -> str:
    """What was carried, what was left out and why, and what comes next."""
    lines = [f"{len(imported.carried)} settings of {file} ({imported.tool}) are carried."]
    if imported.left_out:
        wide = min(36, max(map(len, imported.left_out)))
        lines.append("Not carried, so the training may not be quite the same:")
        lines += (f"  {key:{wide}}  {why}" for key, why in sorted(imported.left_out.items()))
    if imported.filled_in:
        said = ", ".join(f"{key} {value}" for key, value in imported.filled_in.items())
        lines.append(f"Written out, since {imported.tool} has other defaults: {said}.")
    if imported.not_needed:
        lines.append(f"Not needed here: {', '.join(sorted(imported.not_needed))}.")
    lines.append(f"Check it with its data: loractl data check {output or 'job.yaml'}")
    return "\n".join(map(clean_line, lines))
