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

from .axolotl import from_axolotl
from .llama_factory import from_llama_factory
from .translation import Draft, get_key, short, unset_key

_FREE = {"columns", "lr_scheduler_kwargs"}  # mappings with freely chosen keys


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A job from another tool's file, with an account of each setting of that file."""

    tool: str
    job: dict[str, Any]  # the job file: the values that the other file sets, as the spec reads them
    carried: dict[str, str]  # their key -> our key
    left_out: dict[str, str]  # their key -> why; without it the training is different
    not_needed: tuple[str, ...]  # folders, caches, processes: nothing that affects training
    filled_in: dict[str, Any]  # our key -> the tool's default, which differs from ours
    settings: int  # of their file; one in a list counts as its own
    otherwise: dict[str, str]  # their key -> what loractl does differently, if the setting is carried or not set

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "not_needed": list(self.not_needed)}


def import_file(file: Path, folder: Path) -> Imported:
    """Read another tool's file for a job file in `folder`: local paths are written as seen from there.

    Raises SpecError unless it is a YAML mapping, UsageError for a third tool's file or one that trains no LoRA on rows.
    """
    written = {str(key): value for key, value in read_yaml(file, "a configuration")[0].items()}
    theirs = {key: value for key, value in written.items() if value not in (None, "", [], {})}
    if "model_name_or_path" in theirs:
        draft = from_llama_factory(theirs, file, folder)
    elif "base_model" in theirs and ("datasets" in written or "micro_batch_size" in theirs):
        draft = from_axolotl(theirs, file, folder)
    else:
        raise _unknown(theirs, file)
    for key in theirs.keys() - {*draft.carried, *draft.left_out, *draft.not_needed, *draft.otherwise}:
        draft.leave(key, "loractl has no such setting")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("._-")[:63] or "imported"
    draft.job = {"name": name, **draft.job}
    spec = _without_what_is_refused(draft)
    return Imported(
        tool=draft.tool,
        job=_in_order(spec.model_dump(mode="json"), draft.job),
        carried=draft.carried,
        left_out=draft.left_out,
        not_needed=tuple(draft.not_needed),
        filled_in=draft.filled_in,
        settings=len({*draft.carried, *draft.left_out, *draft.not_needed, *(draft.otherwise.keys() & theirs.keys())}),
        otherwise=draft.otherwise,
    )


def _unknown(theirs: dict[str, Any], file: Path) -> UsageError:
    """A file of another kind; the kinds found next to the tools' configurations are named."""
    if "model" in theirs and {"train_dataset", "peft_config", "dist_config"} & theirs.keys():
        hint = "write it with model_name_or_path, dataset and stage, or as a job file"
        return UsageError(f"{file} has LLaMA-Factory's v1 form, which import does not read", hint)
    if {"base_model", "dataset"} <= theirs.keys():
        return UsageError(f"{file} is a job file already", f"loractl submit {file}")
    if {"compute_environment", "distributed_type"} & theirs.keys():
        hint = "loractl assigns cards by itself (resources.cards): give the file that names the model and the data"
        return UsageError(f"{file} is accelerate's: it says on which cards to train, not what", hint)
    hint = "Axolotl's files have base_model and datasets, LLaMA-Factory's model_name_or_path and dataset"
    return UsageError(f"{file} is neither Axolotl's nor LLaMA-Factory's", hint)


def _without_what_is_refused(draft: Draft) -> JobSpec:
    """The job without the values that a job file refuses. Raises SpecError if it needs one of them."""
    while True:
        try:
            return JobSpec.model_validate(draft.job, context=AS_WRITTEN)
        except ValidationError as error:
            key, entry, what = _first_refusal(error)
        if key.startswith("dataset.more.") and entry is not None:  # the others are trained on all the same
            del draft.job["dataset"]["more"][entry]
            draft.leave(name := draft.more.pop(entry), f"{what[0].lower()}{what[1:]}")
            for theirs in [theirs for theirs in draft.carried if theirs == name or theirs.startswith(f"{name}.")]:
                del draft.carried[theirs]
            continue
        names = [theirs for theirs, ours in draft.carried.items() if key == ours or key.startswith(f"{ours}.")]
        if not names or key in ("base_model", "dataset.path"):
            raise SpecError([SpecProblem(file=f"the job from {draft.tool}", line=None, key=key, what=what)])
        for name in names:
            ours = draft.carried.pop(name)
            draft.leave(name, f"{short(get_key(draft.job, ours))}: {what[0].lower()}{what[1:]}")
            unset_key(draft.job, ours)


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
