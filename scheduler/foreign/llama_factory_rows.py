"""The rows of a LLaMA-Factory file: its data sets, as dataset_info.json lists them, and the names of their columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loractl.common.data.fields import SIDES
from loractl.common.errors import UsageError

from .preferences import is_of_pairs
from .translation import Draft, carry_source, from_here, get_key, put_split, set_key, short, unset_key

_LISTING = "dataset_info.json"
_MARKS = {"user_tag": {"human", "user"}, "assistant_tag": {"gpt", "assistant", "chatgpt"}, "system_tag": {"system"},
          "observation_tag": {"observation", "tool", "function_response"}}  # fmt: skip
"""Role names that loractl's rows may have, by LLaMA-Factory's tag."""


def carry_rows(draft: Draft, theirs: dict[str, Any], file: Path, folder: Path) -> None:
    """Carry `dataset` and `eval_dataset`. Raises UsageError if there is none, and for pairs and pictures."""
    if "dataset" not in theirs:
        raise UsageError(f"{file} names no data set", f"dataset is a name from {_LISTING}")
    place, most = _place(file, str(theirs.get("dataset_dir", "data"))), theirs.get("max_samples")
    if "dataset_dir" in theirs:
        draft.skip("dataset_dir")
    alpaca, pairs = get_key(draft.job, "dataset.template") == "alpaca", is_of_pairs(draft)
    names = _names(theirs["dataset"])
    entry: dict[str, Any] = {}
    for number, name in enumerate(names):
        own = Draft(draft.tool, job={"dataset": {"template": "alpaca"}} if alpaca else {})
        listed = _data(own, name, place, folder, most, pairs=pairs)
        _columns(own, listed, texts=theirs.get("stage") == "pt", pairs=pairs)
        carry_source(draft, "dataset" if number == 0 else f"dataset: {name}", own)
        entry = entry or listed
    if "max_samples" in theirs and "max_samples" not in draft.left_out:
        draft.carried["max_samples"] = "dataset.split"
    _mix(draft, theirs)
    if "eval_dataset" in theirs:
        _held_out(draft, _names(theirs["eval_dataset"]), entry, place, folder, most)


def _names(named: Any) -> list[str]:
    return [str(name).strip() for name in (named if isinstance(named, list) else str(named).split(","))] or [""]


def _held_out(draft: Draft, names: list[str], entry: dict[str, Any], place: Path, folder: Path, most: Any) -> None:
    """Rows for evaluation, which LLaMA-Factory also reads from the split train."""
    own = Draft(draft.tool)
    listed = _data(own, names[0], place, folder, most, pairs=is_of_pairs(draft))
    said = own.job["dataset"]
    draft.put("eval_dataset", "dataset.eval_path", said["path"])
    draft.left_out |= own.left_out
    split = said.get("split", "train")
    if split != "train" or not listed.get("file_name"):
        draft.put("eval_dataset", "dataset.eval_split", split)
        draft.carried["eval_dataset"] = "dataset.eval_path"
    unset_key(draft.job, "dataset.test_size")
    if len(names) > 1:
        what = "loractl evaluates a job on one data set: put the rows into one file"
        draft.leave(f"eval_dataset: {', '.join(names[1:])}", what)
    if any(listed.get(part) != entry.get(part) for part in ("formatting", "columns", "tags")):
        what = "loractl reads held-out rows in the same way as the rows to train on"
        draft.leave(f"{_LISTING}: eval_dataset", what)


def _mix(draft: Draft, theirs: dict[str, Any]) -> None:
    """Data sets are taken whole, or interleaved by probabilities, which become shares."""
    strategy, more = str(theirs.get("mix_strategy", "concat")), get_key(draft.job, "dataset.more")
    for key in ("mix_strategy", "interleave_probs"):
        if key in theirs:
            draft.skip(key)
    if not strategy.startswith("interleave") or not more:
        return
    told = theirs.get("interleave_probs")
    given = told if isinstance(told, list) else str(told).split(",") if told else [1] * (len(more) + 1)
    try:
        chances = [float(chance) for chance in given]
    except (TypeError, ValueError):
        chances = []
    if len(chances) != len(more) + 1 or min(chances) <= 0:
        what = "is not a number above 0 for each data set, so all rows are taken"
        draft.leave("interleave_probs", f"{short(told)}: {what}")
        return
    for source, chance in zip(more, chances[1:], strict=True):
        source["share"] = round(chance / sum(chances), 4)
    what = f"{strategy}: LLaMA-Factory draws rows until one or all data sets are used up, and may repeat rows"
    draft.differ(
        "mix_strategy", f"{what}; loractl takes all rows of dataset.path, and of each other set its share, once"
    )


def _place(file: Path, named: str) -> Path:
    """The folder of the data sets. LLaMA-Factory runs in the folder above its examples, and resolves paths there."""
    above = [Path(), *file.resolve().parents[1:4]]
    places = [file.parent / named, *(folder / named for folder in above)]
    return next((place for place in places if (place / _LISTING).is_file()), places[0])


def _data(draft: Draft, name: str, place: Path, folder: Path, most: Any, *, pairs: bool) -> dict[str, Any]:
    """Look a data set up in dataset_info.json, as LLaMA-Factory does. Returns its entry.

    `most`: read at most this many rows. `pairs`: whether it must contain pairs; otherwise it must not.
    """
    listing = place / _LISTING
    entry = _listed(listing, name)
    local, hub = entry.get("file_name"), entry.get("hf_hub_url")
    if isinstance(local, str) and local:
        set_key(draft.job, "dataset.path", from_here(local, place, folder))
    elif isinstance(hub, str) and hub:
        set_key(draft.job, "dataset.path", hub)
    else:
        set_key(draft.job, "dataset.path", name)
        draft.leave(f"dataset: {name}", f"{listing} does not say which file that is: write its path instead")
    split = str(entry.get("split") or "train")
    if most is not None and (type(most) is not int or most < 1 or not split.isidentifier()):
        draft.leave("max_samples", f"{short(most)}: is not a number of rows of the split {split}")
    elif most is not None:
        split = f"{split}[:{most}]"
    put_split(draft, f"{_LISTING}: split", "dataset.split", split)
    columns = part if isinstance(part := entry.get("columns"), dict) else {}
    if seen := {"images", "videos", "audios"} & columns.keys():
        what = f"{listing}: {name} has {', '.join(sorted(seen))}"
        raise UsageError(f"{what}, but loractl trains only on text", "name a data set that has only text")
    if entry and pairs is not (entry.get("ranking") is True):
        has, learns, other = ("no pairs (ranking)", "pairs", "sft") if pairs else ("pairs (ranking)", "answers", "dpo")
        what = f"{listing}: {name} has {has}, but this stage learns from {learns}"
        raise UsageError(what, f"set stage: {other}, or choose another data set")
    _told(draft, entry)
    return entry


def _told(draft: Draft, entry: dict[str, Any]) -> None:
    """Name what a listing says about a data set apart from its columns, and loractl does differently."""
    whole = "loractl trains on every row: put the rows that you want into a file"
    reasons = {
        "num_samples": whole,
        "subset": "loractl reads the hub's default configuration",
        "folder": "loractl reads the hub's whole data set",
        "revision": "write it after the hub's name: owner/name@revision",
    }
    for key in sorted(reasons.keys() & entry.keys()):
        if entry[key] not in (None, ""):
            draft.leave(f"{_LISTING}: {key}", f"{short(entry[key])}: {reasons[key]}")
    tags = tags if isinstance(tags := entry.get("tags"), dict) else {}
    for key, known in _MARKS.items():
        if tags.get(key) not in (None, *known):
            draft.leave(f"{_LISTING}: tags.{key}", f"{short(tags[key])}: is not a role that loractl knows")


def _listed(listing: Path, name: str) -> dict[str, Any]:
    """The data set's entry in dataset_info.json; empty if there is no entry, or no file."""
    try:
        entry = json.loads(listing.read_text(encoding="utf-8")).get(name, {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{listing} can't be read: {error}") from error
    return entry if isinstance(entry, dict) else {}


def _columns(draft: Draft, entry: dict[str, Any], *, texts: bool, pairs: bool) -> None:
    """The listing's column names, if they differ from loractl's. `texts`: rows are plain text, in one column.
    `pairs`: rows have two answers."""
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
        ours_of = {"prompt": "instruction", "query": "input", "system": "system"}
        ours_of |= {} if pairs else {"response": "output"}
        theirs = {ours: columns.get(name, ours) for name, ours in ours_of.items()}
        known = set(ours_of)
        if entry and columns.get("query", "input"):
            # Stanford's template is carried; its wording for an input differs
            alpaca = get_key(draft.job, "dataset.template") == "alpaca"
            here = "under ### Input:, and its first sentence mentions it" if alpaca else "after an empty line"
            what = f"LLaMA-Factory puts a row's input on the next line, loractl {here}"
            draft.differ(f"{_LISTING}: columns.query", what)
    if pairs:
        theirs |= {side: columns.get(side, side) for side in SIDES}
        known |= {*SIDES}
    renamed = {ours: name for ours, name in theirs.items() if name and name != ours}
    if renamed:
        draft.put(f"{_LISTING}: columns", "dataset.columns", renamed)
    for column in sorted(columns.keys() - known):
        draft.leave(f"{_LISTING}: columns.{column}", "loractl's rows have no such column")
