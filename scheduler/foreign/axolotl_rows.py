"""The rows of an Axolotl file: where they are, their kind, and the names of their columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loractl.common.errors import UsageError

from .translation import Draft, carry_source, from_here, put_split, set_key, short, unset_key

_ROLES = {"user": {"human", "user"}, "assistant": {"gpt", "chatgpt", "assistant"}, "system": {"system"},
          "tool": {"tool", "observation", "function_response"}}  # fmt: skip
"""Names of roles that loractl's rows may have, by the role that they mean."""

_AS_HERE = {"roles_to_train": ["assistant"], "train_on_eos": "turn"}  # what loractl does anyway
_PROMPTS = {
    "sharegpt": "sharegpt: Axolotl takes the template that the file names, loractl the model's own",
    "completion": "completion: Axolotl cuts a long text into several rows, loractl keeps its first sequence_len tokens",
}
"""What else a type of rows means there."""

_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": None}

_LOCAL = {"json", "csv", "parquet", "arrow", "text"}
"""Names that stand in `path` where `data_files` are files of this machine."""

_REASONS = {
    **dict.fromkeys(
        ("field_thinking", "template_thinking_key"), "a thought is read of reasoning_content: rename it in the rows"
    ),
    "name": "the hub's default configuration is read",
    "drop_system_message": "a system message is learned from as it stands: take it out of the rows",
    "conversation": "the model's own chat template is used",
    "shards": "every row is trained on: cut those rows into a file",
}


def carry_rows(draft: Draft, theirs: dict[str, Any], file: Path, folder: Path) -> None:
    """Carry `datasets` and `test_datasets`. Raises UsageError where there is no path."""
    if theirs.get("pretraining_dataset") and not theirs.get("datasets"):
        hint = "write it as datasets with type: completion, and with max_steps or num_epochs"
        raise UsageError(f"{file} streams its rows (pretraining_dataset), and a job reads a data set as a whole", hint)
    entries = _entries(theirs.get("datasets"))
    if not entries or "path" not in entries[0]:
        raise UsageError(f"{file} names no data set", "datasets needs an entry with a path")
    for number, entry in enumerate(entries):
        own, others = _source(draft.tool, f"datasets[{number}]", entry, file.parent, folder)
        carry_source(draft, "datasets" if number == 0 else f"datasets[{number}]", own)
        for place in others:
            more = Draft(draft.tool, job={"dataset": {**own.job["dataset"], "path": place}})
            carry_source(draft, f"datasets[{number}].data_files", more)
    _tests(draft, _entries(theirs.get("test_datasets")), entries[0], file.parent, folder)


def _entries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, dict)]


def _source(tool: str, key: str, entry: dict[str, Any], source: Path, folder: Path) -> tuple[Draft, list[str]]:
    """One entry as a draft that has nothing but a data set, and where its further files are."""
    draft = Draft(tool)
    first, *others = _places(draft, key, entry, source, folder)
    set_key(draft.job, "dataset.path", first)
    put_split(draft, f"{key}.split", "dataset.split", entry.get("split"))
    _format(draft, key, entry)
    known = {"path", "data_files", "ds_type", "revision", "split", *_columns(draft, key, entry)}
    for name in sorted(entry.keys() - known, key=str):
        if name == "roles" and _known_roles(entry[name]):
            draft.skip(f"{key}.roles")
        elif entry[name] not in (_AS_HERE.get(name), None):
            draft.leave(f"{key}.{name}", f"{short(entry[name])}: {_REASONS.get(name, 'loractl has no such setting')}")
    return draft, others


def _places(draft: Draft, key: str, entry: dict[str, Any], source: Path, folder: Path) -> list[str]:
    """The files or the hub id of an entry. Its `data_files` are this machine's files, or files within the hub's data
    set."""
    path, files = str(entry["path"]), entry.get("data_files")
    names = [str(name) for name in (files if isinstance(files, list) else [files]) if name]
    if names and path in _LOCAL:
        return [from_here(name, source, folder) for name in names]
    here = [from_here(name, source, folder) for name in names]
    if found := [place for place in here if (folder / place).is_file() or Path(place).is_file()]:
        return found
    if names:
        what = f"{short(names)}: the hub's whole split is read: download that file, and write its path"
        draft.leave(f"{key}.data_files", what)
    revision = entry.get("revision")
    return [f"{path}@{revision}" if revision else from_here(path, source, folder)]


def _tests(draft: Draft, tests: list[dict[str, Any]], first: dict[str, Any], source: Path, folder: Path) -> None:
    """The held-out rows, which are read as the rows to train on are; from the hub their split test."""
    if not tests or "path" not in tests[0]:
        return
    places = _places(draft, "test_datasets[0]", tests[0], source, folder)
    draft.put("test_datasets", "dataset.eval_path", places[0])
    if tests[0].get("split") != "test":
        put_split(draft, "test_datasets[0].split", "dataset.eval_split", tests[0].get("split"))
    unset_key(draft.job, "dataset.test_size")
    if len(tests) > 1 or len(places) > 1:
        draft.leave("test_datasets[1:]", "a job is measured on one data set: put the rows into one file")
    for key in sorted(tests[0].keys() - {"path", "data_files", "ds_type", "revision", "split"}, key=str):
        if tests[0][key] != first.get(key, _AS_HERE.get(key)):
            what = "held-out rows are read as the rows to train on are"
            draft.leave(f"test_datasets[0].{key}", f"{short(tests[0][key])}: {what}")


def _known_roles(roles: Any) -> bool:
    """Whether rows with these names of roles are read here as they are there."""
    return isinstance(roles, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) and name in _ROLES.get(role, ()) for name in names)
        for role, names in roles.items()
    )


def _format(draft: Draft, entry: str, first: dict[str, Any]) -> None:
    """What kind of rows the data set has: a format by name, or names of columns with a template."""
    kind, key = first.get("type", "chat_template"), f"{entry}.type"
    if isinstance(kind, dict):
        fields = ("instruction", "input", "output", "system")
        draft.put(key, "dataset.columns", {ours: name for ours in fields if (name := kind.get(f"field_{ours}"))})
        rest = sorted(str(name) for name, value in kind.items() if not str(name).startswith("field_") and value)
        if rest:
            draft.leave(key, f"{', '.join(rest)}: prompts are made by the model's own chat template")
    elif isinstance(kind, str) and kind in _FORMATS:
        if _FORMATS[kind]:
            draft.put(key, "dataset.format", _FORMATS[kind])
        if kind == "alpaca":
            set_key(draft.job, "dataset.template", "alpaca")
        if kind == "completion":
            set_key(draft.job, "dataset.on_overflow", "truncate")
        if kind in _PROMPTS:
            draft.differ(key, _PROMPTS[kind])
    else:
        draft.leave(key, f"{short(kind)}: rows are recognised by their columns instead")


def _columns(draft: Draft, entry: str, first: dict[str, Any]) -> set[str]:
    """Carry the columns' names. Returns the keys that were looked at."""
    renamed = {"field_messages": "messages", "message_field_role": "role", "message_field_content": "content"}
    for theirs, ours in renamed.items():
        if first.get(theirs):
            draft.put(f"{entry}.{theirs}", f"dataset.columns.{ours}", first[theirs])
    if first.get("type") == "completion" and first.get("field"):
        draft.put(f"{entry}.field", "dataset.columns.text", first["field"])
    known = {"type", "field", *renamed}
    mappings = first.get("message_property_mappings")
    if isinstance(mappings, dict):
        known.add("message_property_mappings")
        for ours in ("role", "content"):
            if mappings.get(ours, ours) != ours:
                draft.put(f"{entry}.message_property_mappings.{ours}", f"dataset.columns.{ours}", mappings[ours])
    return known
