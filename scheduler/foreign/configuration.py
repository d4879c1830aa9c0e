"""Another tool's configuration file as a job, with an account of each of its settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loractl.common.errors import SpecError, SpecProblem, UsageError
from loractl.common.job.document import read_yaml
from loractl.common.job.sections import AS_WRITTEN
from loractl.common.job.spec import JobSpec

from .names import AXOLOTL, FACTORY, Draft, Tool, carry, fill_in, get_key, set_key
from .rows import axolotl_rows, factory_rows

_FREE = {"columns", "lr_scheduler_kwargs"}  # mappings with freely chosen keys


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A job from another tool's file, with an account of each setting of that file."""

    tool: str
    job: dict[str, Any]  # the job file: the values that the other file sets, as the spec reads them
    carried: dict[str, str]  # their key -> our key
    left_out: dict[str, str]  # their key -> its value, and what loractl does instead
    not_needed: tuple[str, ...]  # folders, caches, processes: nothing that affects training
    filled_in: dict[str, Any]  # our key -> the tool's default, which differs from ours

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        return {**vars(self), "not_needed": list(self.not_needed)}


def import_file(file: Path, folder: Path) -> Imported:
    """Read another tool's file for a job file in `folder`: local paths are written as seen from there.

    Raises SpecError unless it is a YAML mapping, UsageError for a third tool's file or one that trains no LoRA on rows.
    """
    written = {str(key): value for key, value in read_yaml(file, "a configuration")[0].items()}
    theirs = {key: value for key, value in written.items() if value not in (None, "", [], {})}
    draft = Draft(theirs)
    if "model_name_or_path" in theirs:
        tool, carry_rows = FACTORY, factory_rows
    elif "base_model" in theirs and ("datasets" in written or "micro_batch_size" in theirs):
        tool, carry_rows = AXOLOTL, axolotl_rows
    else:
        hint = "Axolotl's files have base_model and datasets, LLaMA-Factory's model_name_or_path and dataset"
        raise UsageError(f"{file} is neither Axolotl's nor LLaMA-Factory's", hint)
    _refuse(tool, theirs, file)
    carry(draft, tool)
    carry_rows(draft, file, folder)
    fill_in(draft, tool)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("._-")[:63] or "imported"
    draft.job = {"name": name, **draft.job}
    spec = _without_what_is_refused(draft, tool)
    return Imported(
        tool=tool.name,
        job=_in_order(spec.model_dump(mode="json"), draft.job),
        carried=draft.carried,
        left_out=draft.left_out,
        not_needed=tuple(key for key in draft.not_needed if key not in draft.carried),
        filled_in=draft.filled_in,
    )


def _refuse(tool: Tool, theirs: dict[str, Any], file: Path) -> None:
    for key, (pattern, hint) in tool.refused.items():
        if re.fullmatch(pattern, str(theirs.get(key, False)), re.DOTALL):
            what = f"{file} has {key}: {theirs[key]!s:.60}" if key in theirs else f"{file} trains all weights"
            raise UsageError(
                f"{what}, but loractl trains LoRA and QLoRA on text with answers or pairs of answers", hint
            )


def _without_what_is_refused(draft: Draft, tool: Tool) -> JobSpec:
    """The job without the values that a job file refuses. Raises SpecError if it needs one of them."""
    while True:
        try:
            return JobSpec.model_validate(draft.job, context=AS_WRITTEN)
        except ValidationError as error:
            key, entry, what = _first_refusal(error)
        why = f"{what[:1].lower()}{what[1:]}"
        if key.startswith("dataset.more.") and entry is not None:  # the others are trained on all the same
            draft.leave(name := draft.more.pop(entry), draft.job["dataset"]["more"].pop(entry)["path"], why)
            del draft.carried[name]
            continue
        names = [theirs for theirs, ours in draft.carried.items() if key == ours or key.startswith(f"{ours}.")]
        if not names or key in ("base_model", "dataset.path"):
            raise SpecError([SpecProblem(file=f"the job from {tool.name}", line=None, key=key, what=what)])
        for name in names:
            ours = draft.carried.pop(name)
            draft.leave(name, draft.theirs.get(name, get_key(draft.job, ours)), why)
            set_key(draft.job, ours, None)


def _first_refusal(error: ValidationError) -> tuple[str, int | None, str]:
    """The refused key, the entry of its list, and why."""
    told = error.errors()[0]
    key, what = ".".join(str(part) for part in told["loc"] if not isinstance(part, int)), told["msg"]
    entry = next((part for part in told["loc"] if isinstance(part, int)), None)
    if told["type"] == "literal_error":
        what = "is not a value that loractl knows"
    if not key:  # two keys that do not go together: "key: sentence", a line each
        key, _, what = what.removeprefix("Value error, ").partition("\n")[0].partition(": ")
    return key, entry, what


def _in_order(resolved: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The values to write, as the spec reads them and in its order."""
    if "more" in written:
        resolved = {
            **resolved,
            "more": [_in_order(*each) for each in zip(resolved["more"], written["more"], strict=True)],
        }
    return {
        key: _in_order(value, written[key]) if isinstance(value, dict) and key not in _FREE else value
        for key, value in resolved.items()
        if key in written
    }
