"""The rows of an Axolotl file: where they are, their kind, and the names of their columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loractl.common.data.fields import SIDES
from loractl.common.errors import UsageError

from .preferences import is_of_pairs
from .translation import Draft, carry_source, from_here, get_key, put_split, set_key, short, unset_key

_ROLES = {"user": {"human", "user"}, "assistant": {"gpt", "chatgpt", "assistant"}, "system": {"system"},
          "tool": {"tool", "observation", "function_response"}}  # fmt: skip
"""Role names that loractl's rows may have, by the role that they mean."""

_AS_HERE = {"roles_to_train": ["assistant"], "train_on_eos": "turn"}  # what loractl does anyway
_PROMPTS = {
    "sharegpt": "sharegpt: Axolotl uses the template that the file names, loractl the model's own",
    "completion": "completion: Axolotl cuts a long text into several rows, loractl keeps its first sequence_len tokens",
}
"""What else a row type means in Axolotl."""

_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": None}

_LOCAL = {"json", "csv", "parquet", "arrow", "text"}
"""Values of `path` with which `data_files` are files of this machine."""

_REASONS = {
    **dict.fromkeys(
        ("field_thinking", "template_thinking_key"), "loractl reads reasoning_content: rename the field in the rows"
    ),
    "name": "loractl reads the hub's default configuration",
    "drop_system_message": "loractl keeps system messages: remove them from the rows",
    "conversation": "the model's own chat template is used",
    "shards": "loractl trains on every row: put the rows that you want into a file",
}


def carry_rows(draft: Draft, theirs: dict[str, Any], file: Path, folder: Path) -> None:
    """Carry `datasets` and `test_datasets`. Raises UsageError if there is no path."""
    if theirs.get("pretraining_dataset") and not theirs.get("datasets"):
        hint = "write it as datasets with type: completion, and with max_steps or num_epochs"
        raise UsageError(f"{file} streams its rows (pretraining_dataset), but a job reads a data set as a whole", hint)
    entries = _entries(theirs.get("datasets"))
    if not entries or not all("path" in entry for entry in entries):
        what = "names a data set without its path" if entries else "names no data set"
        raise UsageError(f"{file} {what}", "every entry of datasets needs a path")
    pairs = is_of_pairs(draft)
    for number, entry in enumerate(entries):
        own, others = _source(draft.tool, f"datasets[{number}]", entry, file.parent, folder, pairs=pairs)
        carry_source(draft, "datasets" if number == 0 else f"datasets[{number}]", own)
        for place in others:
            more = Draft(draft.tool, job={"dataset": {**own.job["dataset"], "path": place}})
            carry_source(draft, f"datasets[{number}].data_files", more)
    _tests(draft, _entries(theirs.get("test_datasets")), entries[0], file.parent, folder)


def _entries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, dict)]


def _source(
    tool: str, key: str, entry: dict[str, Any], source: Path, folder: Path, *, pairs: bool
) -> tuple[Draft, list[str]]:
    """One entry as a draft with nothing but a data set, and where its other files are."""
    draft = Draft(tool)
    first, *others = _places(draft, key, entry, source, folder)
    set_key(draft.job, "dataset.path", first)
    put_split(draft, f"{key}.split", "dataset.split", entry.get("split"))
    (_pairs if pairs else _format)(draft, key, entry)
    known = {"path", "data_files", "ds_type", "revision", "split", *_columns(draft, key, entry)}
    known |= {f"field_{side}" for side in SIDES} if pairs else set()
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
        what = f"{short(names)}: loractl reads the hub's whole split: download that file, and write its path"
        draft.leave(f"{key}.data_files", what)
    revision = entry.get("revision")
    return [f"{path}@{revision}" if revision else from_here(path, source, folder)]


def _tests(draft: Draft, tests: list[dict[str, Any]], first: dict[str, Any], source: Path, folder: Path) -> None:
    """The held-out rows, which are read like the rows to train on; from the hub, their split test."""
    if not tests or "path" not in tests[0]:
        return
    places = _places(draft, "test_datasets[0]", tests[0], source, folder)
    draft.put("test_datasets", "dataset.eval_path", places[0])
    if tests[0].get("split") != "test":
        put_split(draft, "test_datasets[0].split", "dataset.eval_split", tests[0].get("split"))
    unset_key(draft.job, "dataset.test_size")
    if len(tests) > 1 or len(places) > 1:
        draft.leave("test_datasets[1:]", "loractl evaluates a job on one data set: put the rows into one file")
    for key in sorted(tests[0].keys() - {"path", "data_files", "ds_type", "revision", "split"}, key=str):
        if tests[0][key] != first.get(key, _AS_HERE.get(key)):
            what = "loractl reads held-out rows in the same way as the rows to train on"
            draft.leave(f"test_datasets[0].{key}", f"{short(tests[0][key])}: {what}")


def _known_roles(roles: Any) -> bool:
    """Whether loractl reads rows with these role names as Axolotl does."""
    return isinstance(roles, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) and name in _ROLES.get(role, ()) for name in names)
        for role, names in roles.items()
    )


def _format(draft: Draft, entry: str, first: dict[str, Any]) -> None:
    """What kind of rows the data set has: a named format, or column names with a template."""
    kind, key = first.get("type", "chat_template"), f"{entry}.type"
    if isinstance(kind, dict):
        fields = ("instruction", "input", "output", "system")
        draft.put(key, "dataset.columns", {ours: name for ours in fields if (name := kind.get(f"field_{ours}"))})
        rest = sorted(str(name) for name, value in kind.items() if not str(name).startswith("field_") and value)
        if rest:
            draft.leave(key, f"{', '.join(rest)}: the model's own chat template makes the prompts")
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


_TEMPLATED = ("chatml", "llama3")
"""What the first word of a type says about the marks around messages."""

_QUESTIONS = {
    "intel": {"instruction": "question"},
    "icr": {"instruction": "input"},
    "prompt_pairs": {"instruction": "prompt"},
    "argilla": {"chosen": "chosen_response", "rejected": "rejected_response"},
    "default": {"instruction": "prompt"},
    "argilla_chat": {},
    "ultra": {},
}
"""The columns of a pair type, by its last word, that have other names here."""


_AS_THEY_ARE = (
    None, "passthrough",
    "chat_template", "chat_template.default", "chat_template.argilla", "chat_template.argilla_chat",
)  # fmt: skip
"""Pair types that need no key."""


def _pairs(draft: Draft, entry: str, first: dict[str, Any]) -> None:
    """What kind of pairs the data set has: a named form, or column names with formats."""
    kind, key = first.get("type"), f"{entry}.type"
    for side in SIDES:
        _rename(
            draft, f"{entry}.field_{side}", {side: name} if (name := first.get(f"field_{side}", side)) != side else {}
        )
    if isinstance(kind, dict):
        _formatted_pairs(draft, key, kind)
        return
    marks, _, form = str(kind or "passthrough").partition(".")
    if marks in _TEMPLATED and form in _QUESTIONS:
        _rename(draft, key, _QUESTIONS[form])
        what = f"{kind}: Axolotl puts {marks}'s marks around messages, loractl those of the model's own chat template"
        if form == "default":
            what += "; Axolotl's question is the first of prompt, input, question and instruction, loractl's is prompt"
        draft.differ(key, what)
    elif kind not in _AS_THEY_ARE:
        draft.leave(key, f"{short(kind)}: pairs are recognised by their columns instead, chosen and rejected")


def _rename(draft: Draft, key: str, columns: dict[str, Any]) -> None:
    if columns:
        draft.put(key, "dataset.columns", {**(get_key(draft.job, "dataset.columns") or {}), **columns})


def _formatted_pairs(draft: Draft, key: str, kind: dict[str, Any]) -> None:
    """Column names, and the text around their contents, which the model's chat template replaces."""
    formats = sorted(name for name in map(str, kind) if name.endswith("_format") and kind.get(name))
    plain = all(kind[name] == f"{{{name.removesuffix('_format')}}}" for name in formats)
    ours_of = {"prompt": "prompt" if plain else "instruction", **{side: side for side in SIDES}}
    ours_of |= {} if plain else {"system": "system"}
    named = {ours: kind.get(f"field_{theirs}") or theirs for theirs, ours in ours_of.items()}
    _rename(draft, key, {ours: name for ours, name in named.items() if ours != name})
    if plain:
        set_key(draft.job, "dataset.format", "preference_text")
    else:
        draft.leave(key, f"{', '.join(formats)}: the model's own chat template makes the prompts")


def _columns(draft: Draft, entry: str, first: dict[str, Any]) -> set[str]:
    """Carry the column names. Returns the keys that were read."""
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
