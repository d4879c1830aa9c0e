"""The rows of a LLaMA-Factory file: its data sets, as dataset_info.json lists them, and the names of their columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loractl.common.errors import UsageError

from .translation import Draft, from_here, get_key, refuse_objective, short, unset_key

_LISTING = "dataset_info.json"
_MARKS = {"user_tag": {"human", "user"}, "assistant_tag": {"gpt", "assistant", "chatgpt"}, "system_tag": {"system"},
          "observation_tag": {"observation", "tool", "function_response"}}  # fmt: skip
"""Names of roles that loractl's rows may have, by the tag that LLaMA-Factory gives them."""


def carry_rows(draft: Draft, theirs: dict[str, Any], file: Path, folder: Path) -> None:
    """Carry `dataset` and `eval_dataset`. Raises UsageError where there is none, and for pairs and pictures."""
    if "dataset" not in theirs:
        raise UsageError(f"{file} names no data set", f"dataset is a name from {_LISTING}")
    place = _place(file, str(theirs.get("dataset_dir", "data")))
    if "dataset_dir" in theirs:
        draft.skip("dataset_dir")
    entry = _data(draft, "dataset", theirs["dataset"], place, folder)
    _columns(draft, entry, texts=theirs.get("stage") == "pt")
    if "eval_dataset" in theirs:
        held_out = _data(draft, "eval_dataset", theirs["eval_dataset"], place, folder)
        unset_key(draft.job, "dataset.test_size")
        if any(held_out.get(part) != entry.get(part) for part in ("formatting", "columns", "tags")):
            draft.leave(f"{_LISTING}: eval_dataset", "held-out rows are read as the rows to train on are")


def _place(file: Path, named: str) -> Path:
    """The folder of the data sets. LLaMA-Factory is started above its examples, and takes it from there."""
    above = [Path(), *file.resolve().parents[1:4]]
    places = [file.parent / named, *(folder / named for folder in above)]
    return next((place for place in places if (place / _LISTING).is_file()), places[0])


def _data(draft: Draft, key: str, named: Any, place: Path, folder: Path) -> dict[str, Any]:
    """Look the data set up in dataset_info.json, as LLaMA-Factory does. Returns what that says of it."""
    names = [str(name).strip() for name in (named if isinstance(named, list) else str(named).split(","))] or [""]
    if len(names) > 1:
        draft.leave(f"{key}: {', '.join(names[1:])}", "a job trains on one data set: put the rows into one file")
    ours = "dataset.path" if key == "dataset" else "dataset.eval_path"
    listing = place / _LISTING
    entry = _listed(listing, names[0])
    local, hub = entry.get("file_name"), entry.get("hf_hub_url")
    if isinstance(local, str) and local:
        draft.put(key, ours, from_here(local, place, folder))
    elif isinstance(hub, str) and hub:
        draft.put(key, ours, hub)
    else:
        draft.put(key, ours, names[0])
        draft.leave(f"{key}: {names[0]}", f"{listing} does not say which file that is: write its path into {ours}")
    columns = part if isinstance(part := entry.get("columns"), dict) else {}
    if seen := {"images", "videos", "audios"} & columns.keys():
        what = f"{listing}: {names[0]} has {', '.join(sorted(seen))}"
        raise UsageError(f"{what}, and loractl trains on text alone", "name a data set of text alone")
    if entry.get("ranking") is True:
        raise refuse_objective(f"{listing}: {names[0]} has pairs (ranking)", "take another data set")
    _told(draft, entry)
    return entry


def _told(draft: Draft, entry: dict[str, Any]) -> None:
    """Name what a listing says of a data set beside its columns, and loractl does otherwise."""
    whole = "every row is trained on: cut those rows into a file"
    reasons = {
        "num_samples": whole,
        "split": "the hub's split train is read, and its split test for held-out rows",
        "subset": "the hub's default configuration is read",
        "folder": "the hub's whole data set is read",
        "revision": "write it behind the hub's name: owner/name@revision",
    }
    usual = {"split": "train"}
    for key in sorted(reasons.keys() & entry.keys()):
        if entry[key] not in (None, "", usual.get(key)):
            draft.leave(f"{_LISTING}: {key}", f"{short(entry[key])}: {reasons[key]}")
    tags = tags if isinstance(tags := entry.get("tags"), dict) else {}
    for key, known in _MARKS.items():
        if tags.get(key) not in (None, *known):
            draft.leave(f"{_LISTING}: tags.{key}", f"{short(tags[key])}: is not a role's name that loractl knows")


def _listed(listing: Path, name: str) -> dict[str, Any]:
    """What dataset_info.json says of a data set; nothing where it does not name it, or is not there."""
    try:
        entry = json.loads(listing.read_text(encoding="utf-8")).get(name, {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{listing} can't be read: {error}") from error
    return entry if isinstance(entry, dict) else {}


def _columns(draft: Draft, entry: dict[str, Any], *, texts: bool) -> None:
    """The listing's names of columns, where they differ from loractl's. `texts`: rows are plain text, in one column."""
    columns, tags = ({} if not isinstance(part := entry.get(key), dict) else part for key in ("columns", "tags"))
    if texts:
        theirs = {"text": columns.get("prompt", "instruction" if entry else "text")}
        known = {"prompt"}
    elif entry.get("formatting") == "sharegpt":
        openai = tags.get("content_tag") == "content"
        role, content = ("role", "content") if openai else ("from", "value")
        theirs = {
            "messages" if openai else "conversations": columns.get("messages", "conversations"),
            role: tags.get("role_tag", "from"),
            content: tags.get("content_tag", "value"),
            "system": columns.get("system", "system"),
        }
        known = {"messages", "system"}
    else:
        ours_of = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
        theirs = {ours: columns.get(name, ours) for name, ours in ours_of.items()}
        known = set(ours_of)
        if entry and columns.get("query", "input"):
            # of Stanford's template, which is carried, the form with an input has words of its own
            alpaca = get_key(draft.job, "dataset.template") == "alpaca"
            here = "under ### Input: here, and the first sentence names it" if alpaca else "after an empty line here"
            draft.differ(f"{_LISTING}: columns.query", f"a row's input follows on the next line there, {here}")
    renamed = {ours: name for ours, name in theirs.items() if name and name != ours}
    if renamed:
        draft.put(f"{_LISTING}: columns", "dataset.columns", renamed)
    for column in sorted(columns.keys() - known):
        draft.leave(f"{_LISTING}: columns.{column}", "loractl's rows have no such column")
