"""Another tool's configuration file as a job: its data sets, and an account of each of its settings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loractl.common.errors import SpecError, SpecProblem, UsageError
from loractl.common.job.document import read_yaml
from loractl.common.job.sections import AS_WRITTEN
from loractl.common.job.spec import JobSpec

from .names import AXOLOTL, FACTORY, Draft, Tool, carry, fill_in, get_key, set_key, short

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
        names = [
            theirs
            for theirs, ours in draft.carried.items()
            if f"{key}.".startswith(f"{ours}.") or ours.startswith(f"{key}.")  # or a section as a whole
        ]
        if not names or {"base_model", "dataset.path"} & {draft.carried[name] for name in names}:
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


_LISTING = "dataset_info.json"

_TYPES: dict[str, dict[str, Any]] = {
    "alpaca": {"format": "alpaca", "template": "alpaca"},
    "sharegpt": {"format": "sharegpt"},
    "completion": {"format": "text", "on_overflow": "truncate"},
    "chat_template": {},
    "passthrough": {},
    "default": {},
    "argilla_chat": {},
    "ultra": {},
    "chatml.default": {"columns": {"instruction": "prompt"}},
    "intel": {"columns": {"instruction": "question"}},
    "icr": {"columns": {"instruction": "input"}},
    "prompt_pairs": {"columns": {"instruction": "prompt"}},
    "argilla": {"columns": {"chosen": "chosen_response", "rejected": "rejected_response"}},
    "chat_template.argilla": {},
}
"""What a row type of Axolotl is here, by its name or by its last word: the first words name a chat template."""

_COLUMNS = {
    "field_messages": "messages", "message_field_role": "role", "message_field_content": "content", "field": "text",
    "field_chosen": "chosen", "field_rejected": "rejected",
}  # fmt: skip

_AS_HERE = {"roles_to_train": ["assistant"], "train_on_eos": "turn"}

_LOCAL = {"json", "csv", "parquet", "arrow", "text"}
"""Values of `path` with which `data_files` are files of this machine."""


def axolotl_rows(draft: Draft, file: Path, folder: Path) -> None:
    """Carry `datasets` and `test_datasets`. Raises UsageError if there is no path."""
    entries = _entries(draft.theirs.get("datasets"))
    if not entries or not all("path" in entry for entry in entries):
        what = "names a data set without its path" if entries else "names no data set"
        raise UsageError(f"{file} {what}", "every entry of datasets needs a path, and streamed rows a list datasets")
    for number, entry in enumerate(entries):
        key = f"datasets[{number}]"
        places, said = _places(draft, key, entry, file.parent, folder), _axolotl_kind(draft, key, entry)
        for place in places:
            _add(draft, "datasets" if number == 0 else key, {"path": place, **said})
    for number, test in enumerate(_entries(draft.theirs.get("test_datasets"))):
        key = f"test_datasets[{number}]"
        if number > 0 or "path" not in test:
            draft.leave(key, test.get("path", test), _HELD_OUT_ONCE if number > 0 else None)
            continue
        place, *others = _places(draft, key, test, file.parent, folder)
        if others:
            draft.leave(f"{key}.data_files", others, _HELD_OUT_ONCE)
        _hold_out(draft, "test_datasets", {"path": place, **_axolotl_kind(draft, key, test)})


def _entries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, dict)]


def _places(draft: Draft, key: str, entry: dict[str, Any], source: Path, folder: Path) -> list[str]:
    """The files or the hub id of an entry."""
    path, files, revision = str(entry["path"]), entry.get("data_files"), entry.get("revision")
    names = [str(name) for name in (files if isinstance(files, list) else [files]) if name]
    if names and path in _LOCAL:
        return [_from_here(name, source, folder) for name in names]
    if names:
        draft.leave(f"{key}.data_files", names, "loractl reads the whole split: download that file, and write its path")
    return [f"{path}@{revision}" if revision else _from_here(path, source, folder)]


def _axolotl_kind(draft: Draft, key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Split, format, columns and template of an entry; what else it says is left out."""
    kind = entry.get("type") or "chat_template"
    said: dict[str, Any] = {"split": entry.get("split")}
    columns: dict[str, Any] = {}
    if isinstance(kind, dict):
        columns = {name.removeprefix("field_"): value for name, value in kind.items() if name.startswith("field_")}
        if rest := {name: value for name, value in kind.items() if value and not name.startswith("field_")}:
            draft.leave(f"{key}.type", rest, "the model's own chat template makes the prompts")
        if draft.job.get("task_type") == "preference":
            said["format"] = "preference_text"
    elif (known := next((name for name in (str(kind), str(kind).rpartition(".")[2]) if name in _TYPES), "")) != "":
        said |= _TYPES[known]
        columns = dict(said.pop("columns", {}))
    else:
        draft.leave(f"{key}.type", kind, "rows are recognised by their columns instead")
    for name, ours in _COLUMNS.items():
        if name in entry:
            columns[ours] = entry[name]
    mappings = entry.get("message_property_mappings")
    columns |= {ours: mappings[ours] for ours in ("role", "content") if isinstance(mappings, dict) and ours in mappings}
    read = {"path", "data_files", "ds_type", "revision", "split", "type", "message_property_mappings", *_COLUMNS}
    for name in sorted(entry.keys() - read, key=str):
        if entry[name] not in (None, _AS_HERE.get(name)):
            draft.leave(f"{key}.{name}", entry[name])
    return {**said, "columns": {ours: name for ours, name in columns.items() if name and name != ours}}


def factory_rows(draft: Draft, file: Path, folder: Path) -> None:
    """Carry `dataset` and `eval_dataset`. Raises UsageError if there is none, and for pictures."""
    theirs = draft.theirs
    names = _names(theirs.get("dataset", []))
    if not names:
        raise UsageError(f"{file} names no data set", f"dataset is a name from {_LISTING}")
    named = str(theirs.get("dataset_dir", "data"))
    # LLaMA-Factory runs in the folder above its examples, and resolves paths there
    places = [file.parent / named, Path(named), *(above / named for above in file.resolve().parents[1:4])]
    place = next((place for place in places if _is_file(place / _LISTING)), places[0])
    for number, name in enumerate(names):
        key = "dataset" if number == 0 else f"dataset: {name}"
        if key in draft.more:  # trained on for a third time
            key += f" ({number + 1})"
        _add(draft, key, _listed(draft, name, place, folder))
    for number, name in enumerate(_names(theirs.get("eval_dataset", []))):
        if number == 0:
            _hold_out(draft, "eval_dataset", _listed(draft, name, place, folder))
        else:
            draft.leave(f"eval_dataset: {name}", name, _HELD_OUT_ONCE)


def _names(named: Any) -> list[str]:
    each = [str(name).strip() for name in (named if isinstance(named, list) else str(named).split(",")) if name]
    return [name for name in each if name]


def _listed(draft: Draft, name: str, place: Path, folder: Path) -> dict[str, Any]:
    """A data set as dataset_info.json has it."""
    try:
        entry = json.loads((place / _LISTING).read_text(encoding="utf-8")).get(name)
    except FileNotFoundError:
        entry = None
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{place / _LISTING} can't be read: {error}") from error
    entry = entry if isinstance(entry, dict) else {}
    columns, tags = (part if isinstance(part := entry.get(key), dict) else {} for key in ("columns", "tags"))
    if seen := {"images", "videos", "audios"} & columns.keys():
        what = f"{place / _LISTING}: {name} has {', '.join(sorted(seen))}, but loractl trains only on text"
        raise UsageError(what, "name a data set that has only text")
    if local := entry.get("file_name"):
        path = _from_here(str(local), place, folder)
    else:
        path = str(entry.get("hf_hub_url") or name)
        if "hf_hub_url" not in entry:
            draft.leave(f"dataset: {name}", name, f"{place / _LISTING} does not say which file that is: write its path")
    split, most = entry.get("split"), draft.theirs.get("max_samples")
    if type(most) is int:
        split = f"{split or 'train'}[:{most}]"
        draft.carried["max_samples"] = "dataset.split"
    for key in sorted(entry.keys() & {"num_samples", "subset", "folder", "revision"}):
        draft.leave(f"{name}: {key}", entry[key])
    for column in sorted(columns.keys() & {"history", "tools"}):
        draft.leave(f"{name}: {column}", columns[column])
    names = _factory_columns(draft, entry, columns, tags)
    return {"path": path, "split": split, "columns": {ours: there for ours, there in names.items() if there != ours}}


def _factory_columns(
    draft: Draft, entry: dict[str, Any], columns: dict[str, Any], tags: dict[str, Any]
) -> dict[str, Any]:
    """Our columns, each with its name in the rows."""
    if draft.theirs.get("stage") == "pt":
        return {"text": columns.get("prompt", "instruction" if entry else "text")}
    if entry.get("formatting") == "sharegpt":
        openai = tags.get("content_tag") == "content"
        ours = ("messages", "role", "content") if openai else ("conversations", "from", "value")
        there = (
            columns.get("messages", "conversations"),
            tags.get("role_tag", "from"),
            tags.get("content_tag", "value"),
        )
        named = dict(zip(ours, there, strict=True))
    else:
        ours_of = {"prompt": "instruction", "query": "input", "response": "output"}
        named = {ours: columns[there] for there, ours in ours_of.items() if columns.get(there)}
    return named | {side: columns[side] for side in ("system", "chosen", "rejected") if columns.get(side)}


_HELD_OUT_ONCE = "a job has one data set of held-out rows: put all of them into one file"

_USUAL = {"format": "auto", "columns": {}, "template": "chat", "on_overflow": "drop"}
"""What holds for rows of which the other file says nothing. Only Axolotl's types of rows say on_overflow."""


def _add(draft: Draft, theirs: str, said: dict[str, Any]) -> None:
    """The first data set is dataset.path, each other an entry of dataset.more, with the first one's template."""
    said = {key: value for key, value in said.items() if key == "path" or value not in (None, {}, "")}
    if said.get("split") == "train":
        del said["split"]
    first = get_key(draft.job, "dataset") or {}
    if "path" not in first:
        draft.job["dataset"] = {**said, **first}
        draft.carried |= {f"{theirs}: {key}": f"dataset.{key}" for key in said if key != "path" and key not in first}
        draft.carried[theirs] = "dataset.path"
        _leave_what_differs(draft, theirs, said, first.keys() & _USUAL.keys())
        return
    draft.carried[theirs] = "dataset.more"
    inherited = {key: _USUAL[key] for key in ("format", "columns")}
    own = {
        key: said.get(key, usual) for key, usual in inherited.items() if first.get(key, usual) != said.get(key, usual)
    }
    own |= {key: said[key] for key in ("path", "split") if key in said}
    set_key(draft.job, "dataset.more", [*first.get("more", []), own])
    draft.more.append(theirs)
    _leave_what_differs(draft, theirs, said, _USUAL.keys() - inherited.keys())


def _hold_out(draft: Draft, theirs: str, said: dict[str, Any]) -> None:
    """The held-out rows, which are read as the rows of dataset.path are."""
    draft.put(theirs, "dataset.eval_path", said["path"])
    set_key(draft.job, "dataset.eval_split", said["split"])
    set_key(draft.job, "dataset.test_size", None)
    _leave_what_differs(draft, theirs, said, _USUAL.keys())


def _leave_what_differs(draft: Draft, theirs: str, said: dict[str, Any], keys: Iterable[str]) -> None:
    """Name what holds for these rows in the other file, where the job's one value for all rows is another."""
    for_all = {ours for name, ours in draft.carried.items() if name in draft.theirs}  # not by the first data set alone
    for key in sorted(keys):
        here = draft.job["dataset"].get(key, _USUAL[key])
        there = said.get(key) or (here if f"dataset.{key}" in for_all else _USUAL[key])
        if there != here:
            draft.leave(f"{theirs}: {key}", there, f"the job's dataset.{key}, {short(here)}, is for all of its rows")


def _from_here(path: str, source: Path, folder: Path) -> str:
    """A local path as seen from the job file's folder. The other tool resolves it in the folder where it is started."""
    for place in (source / path, Path(path)):
        if _is_file(place):
            return path if Path(path).is_absolute() else os.path.relpath(place, folder)
    return path


def _is_file(place: Path) -> bool:
    return os.path.isfile(place)  # noqa: PTH113 - False for a name too long for a file, where Path.is_file raises
