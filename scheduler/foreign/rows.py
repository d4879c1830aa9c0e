"""The data sets of Axolotl's and LLaMA-Factory's files: where they are, their kind, and the names of their columns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loractl.common.errors import UsageError

from .names import Draft, get_key, set_key

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
    for test in _entries(draft.theirs.get("test_datasets"))[:1]:
        if "path" in test:
            draft.put("test_datasets", "dataset.eval_path", _places(draft, "test", test, file.parent, folder)[0])
            set_key(draft.job, "dataset.eval_split", test.get("split"))
            set_key(draft.job, "dataset.test_size", None)


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
    if "dataset" not in theirs:
        raise UsageError(f"{file} names no data set", f"dataset is a name from {_LISTING}")
    named = str(theirs.get("dataset_dir", "data"))
    # LLaMA-Factory runs in the folder above its examples, and resolves paths there
    places = [file.parent / named, Path(named), *(above / named for above in file.resolve().parents[1:4])]
    place = next((place for place in places if _is_file(place / _LISTING)), places[0])
    for number, name in enumerate(_names(theirs["dataset"])):
        key = "dataset" if number == 0 else f"dataset: {name}"
        _add(draft, key, _listed(draft, name, place, folder))
    for name in _names(theirs.get("eval_dataset", []))[:1]:
        listed = _listed(draft, name, place, folder)
        draft.put("eval_dataset", "dataset.eval_path", listed["path"])
        set_key(draft.job, "dataset.eval_split", listed["split"])
        set_key(draft.job, "dataset.test_size", None)


def _names(named: Any) -> list[str]:
    return [str(name).strip() for name in (named if isinstance(named, list) else str(named).split(","))]


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


def _add(draft: Draft, theirs: str, said: dict[str, Any]) -> None:
    """The first data set is dataset.path, each other an entry of dataset.more, with the first one's template."""
    said = {key: value for key, value in said.items() if key == "path" or value not in (None, {}, "")}
    if said.get("split") == "train":
        del said["split"]
    first = get_key(draft.job, "dataset") or {}
    if "path" not in first:
        draft.job["dataset"] = {**said, **first}
        draft.carried |= {f"{theirs}: {key}": f"dataset.{key}" for key in said if key != "path"}
        draft.carried[theirs] = "dataset.path"
        return
    draft.carried[theirs] = "dataset.more"
    inherited = {"format": "auto", "columns": {}}
    own = {
        key: said.get(key, usual) for key, usual in inherited.items() if first.get(key, usual) != said.get(key, usual)
    }
    own |= {key: said[key] for key in ("path", "split") if key in said}
    set_key(draft.job, "dataset.more", [*first.get("more", []), own])
    draft.more.append(theirs)


def _from_here(path: str, source: Path, folder: Path) -> str:
    """A local path as seen from the job file's folder. The other tool resolves it in the folder where it is started."""
    for place in (source / path, Path(path)):
        if _is_file(place):
            return path if Path(path).is_absolute() else os.path.relpath(place, folder)
    return path


def _is_file(place: Path) -> bool:
    return os.path.isfile(place)  # noqa: PTH113 - False for a name too long for a file, where Path.is_file raises
