"""How another tool's settings become keys of a job file: a draft, filled by rules."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loractl.common.adapter_config import is_module_name
from loractl.common.errors import UsageError
from loractl.common.job.slices import parse_split

NOT_SUPERVISED = "loractl fine-tunes adapters on rows with answers, labels or pairs of answers"


@dataclass
class Draft:
    """A job file in the making, and what became of each key of the other tool's file so far."""

    tool: str
    job: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    not_needed: list[str] = field(default_factory=list)
    filled_in: dict[str, Any] = field(default_factory=dict)
    otherwise: dict[str, str] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)  # their names for the entries of dataset.more

    def put(self, theirs: str, ours: str, value: Any) -> None:
        """Carry a value under our name."""
        set_key(self.job, ours, value)
        self.carried[theirs] = ours

    def leave(self, theirs: str, why: str) -> None:
        """Name a key that is not carried although it changes the training."""
        self.left_out[theirs] = why

    def differ(self, theirs: str, how: str) -> None:
        """Name what the other tool does, by this setting or by default, and loractl does differently."""
        self.otherwise[theirs] = how

    def skip(self, theirs: str) -> None:
        """Name a key that loractl does not need."""
        self.not_needed.append(theirs)


def carry_same(draft: Draft, theirs: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Carry the settings that only have other names here."""
    steps = theirs.get("max_steps")
    stops = isinstance(steps, int) and steps > 0
    for key in (name for name in names if name in theirs):
        # max_steps overrides the epochs if it is positive
        if (stops and names[key] == "training.num_train_epochs") or (not stops and key == "max_steps"):
            draft.skip(key)
        else:
            draft.put(key, names[key], theirs[key])


def skip_all(draft: Draft, theirs: Mapping[str, Any], names: set[str], pattern: re.Pattern[str]) -> None:
    """Name the settings that loractl does not need: by name, or by a pattern for the whole name."""
    for key in sorted(key for key in theirs if key in names or pattern.fullmatch(key)):
        draft.skip(key)


def leave_all(draft: Draft, theirs: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Name the settings that change the training and have no counterpart, each with its reason."""
    for key in sorted(reasons.keys() & theirs.keys()):
        if theirs[key] is False:
            draft.skip(key)
        else:
            draft.leave(key, f"{short(theirs[key])}: {reasons[key]}")


def carry_by_rules(
    draft: Draft, theirs: dict[str, Any], rules: Mapping[str, Callable[[Draft, str, Any], None]]
) -> None:
    """Carry the settings whose values differ here, each by its rule."""
    for key in rules:  # in the order of the rules: a later one may overrule an earlier one
        if key in theirs:
            rules[key](draft, key, theirs[key])


def fill_in(draft: Draft, defaults: Mapping[str, Any]) -> None:
    """Write out the other tool's defaults where loractl's differ."""
    for key, value in defaults.items():
        if get_key(draft.job, key) is None and not (
            key == "training.num_train_epochs" and get_key(draft.job, "training.max_steps")
        ):
            set_key(draft.job, key, value)
            draft.filled_in[key] = value


def from_here(path: Any, source: Path, folder: Path) -> str:
    """A local path as seen from the job file's folder. The other tool resolves it in the folder where it is started."""
    text = str(path)
    for place in (source / text, Path(text)):
        if place.is_file():
            return text if Path(text).is_absolute() else os.path.relpath(place, folder)
    return text


def carry_run_name(draft: Draft, theirs: Mapping[str, Any], key: str) -> None:
    """Carry what a run is called, if the job reports to a tracker that names runs."""
    if key not in theirs:
        return
    if {*(get_key(draft.job, "training.report_to") or ())} - {"tensorboard"}:
        draft.put(key, "training.tracker.run_name", str(theirs[key]))
    else:
        draft.skip(key)


def put_split(draft: Draft, theirs: str, ours: str, split: Any) -> None:
    """Carry which rows of a data set are read; the whole split train needs no key."""
    if split in (None, "", "train"):
        return
    try:
        parse_split(str(split))
    except ValueError as error:
        draft.leave(theirs, f"{short(split)}: {error}")
    else:
        draft.put(theirs, ours, str(split))


def carry_source(draft: Draft, theirs: str, own: Draft) -> None:
    """Carry a data set, with its account: the first as dataset.path, each other into dataset.more."""
    draft.left_out |= own.left_out
    draft.otherwise |= own.otherwise
    draft.not_needed += own.not_needed
    said: dict[str, Any] = own.job["dataset"]
    first = get_key(draft.job, "dataset") or {}
    if "path" not in first:
        draft.carried |= own.carried
        draft.carried[theirs] = "dataset.path"
        draft.job["dataset"] = first | said
        return
    texts = {"text": "plain text", "preference_text": "plain text"}
    forms = [texts.get(str(each.get("format")), "conversations") for each in (first, said)]
    if forms[0] != forms[1]:
        draft.leave(theirs, f"{short(said['path'])}: {forms[1]} can't be mixed with {forms[0]}: train a job on each")
        return
    draft.carried |= dict.fromkeys((*own.carried, theirs), "dataset.more")
    if said.get("template") != first.get("template"):
        draft.differ(theirs, "its prompts have the same template as those of the first data set (dataset.template)")
    usual = {"split": "train", "format": "auto", "columns": {}}
    inherited = {"split": "train", "format": first.get("format", "auto"), "columns": first.get("columns", {})}
    own_keys = {key: said.get(key, value) for key, value in usual.items()}
    kept = {key: value for key, value in own_keys.items() if value != inherited[key]}
    draft.more.append(theirs)
    set_key(draft.job, "dataset.more", [*first.get("more", []), {"path": said["path"], **kept}])


def choice(ours: str, values: Mapping[Any, Any], why: str) -> Callable[[Draft, str, Any], None]:
    """A setting whose values differ here; None: the value needs no key."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        known = value.lower() if isinstance(value, str) else value
        if not isinstance(known, (str, bool, int)) or known not in values:
            draft.leave(key, f"{short(value)}: {why}")
        elif values[known] is None:
            draft.skip(key)
        else:
            draft.put(key, ours, values[known])

    return rule


def only(accepted: Any, why: str) -> Callable[[Draft, str, Any], None]:
    """A setting for which loractl takes only one value."""
    return only_of((accepted,), why)


def only_of(accepted: tuple[Any, ...], why: str) -> Callable[[Draft, str, Any], None]:
    """A setting for which loractl takes only a few values."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value in accepted:
            draft.skip(key)
        else:
            draft.leave(key, why)

    return rule


HELD_OUT = "loractl always holds out a tenth (dataset.test_size), to compare base and tuned on it"


def tell_held_out(draft: Draft, theirs: Mapping[str, Any], key: str) -> None:
    """Say that a tenth of the rows is held out if their file says nothing about it."""
    if key not in theirs and get_key(draft.job, "dataset.eval_path") is None:
        draft.differ(key, f"not set: {draft.tool} holds out no rows, {HELD_OUT}")


def refuse_pictures(theirs: Mapping[str, Any], keys: set[str], file: Path) -> None:
    """Raises UsageError for a training on more than text: its rows would silently lose their pictures."""
    if found := sorted(key for key in keys & theirs.keys() if theirs[key] is not False):
        what = f"{file} trains on pictures or sound ({', '.join(found)}), but loractl trains only on text"
        raise UsageError(what, f"take {found[0]} out if the rows have only text")


def refuse_objective(what: str, instead: str) -> UsageError:
    """An objective other than the next token of an answer. `instead`: what would make it a job."""
    return UsageError(f"{what}: {NOT_SUPERVISED}, by no other objective", f"{instead} and give it rows with answers")


def evaluate_each(draft: Draft, key: str, times: float) -> None:
    """A number of evaluations per epoch, as a share of all steps."""
    epochs = get_key(draft.job, "training.num_train_epochs") or 1
    known = isinstance(times, (int, float)) and isinstance(epochs, (int, float)) and times > 0 and epochs > 0
    if not known or times * epochs < 1:
        draft.leave(key, f"{short(times)}: loractl can't spread this number of evaluations over the steps")
    elif times * epochs == 1:
        draft.skip(key)  # once, at the end, is what loractl does anyway
    else:
        draft.put(key, "training.eval_steps", 1 / (times * epochs))


def held_out(draft: Draft, key: str, value: Any) -> None:
    """The share of rows that is held out, which other tools may give as a number of rows."""
    if isinstance(value, (int, float)) and 0 < value < 1:
        draft.put(key, "dataset.test_size", value)
    elif value:
        draft.leave(key, f"{short(value)} rows: dataset.test_size is a share, so a tenth is held out")
    else:
        draft.differ(key, f"0: {draft.tool} holds out no rows, {HELD_OUT}")


def names_of(ours: str) -> Callable[[Draft, str, Any], None]:
    """A list of modules, also written with commas; or a regular expression, which is carried as it is."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
        if isinstance(value, str) and not all(map(is_module_name, names)):
            draft.put(key, ours, value)
            return
        draft.put(key, ours, "all-linear" if names in (["all"], ["all-linear"]) else names)

    return rule


def truth(ours: str) -> Callable[[Draft, str, Any], None]:
    """A switch that may also name a method."""
    return lambda draft, key, value: draft.put(key, ours, bool(value))


_OPTIMIZERS = {
    name: name
    for name in (
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_32bit",
        "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "ademamix", "ademamix_8bit", "adafactor", "adagrad",
        "rmsprop", "sgd",
    )
} | {
    "adamw_bnb_8bit": "adamw_8bit", "adamw_torch_8bit": "adamw_8bit", "adamw_hf": "adamw_torch",
    "paged_adamw": "paged_adamw_32bit",
}  # fmt: skip


_UNPAGED = {"paged_adamw_32bit": "adamw_torch"} | {
    f"paged_{name}": name for name in ("adamw_8bit", "lion_32bit", "lion_8bit")
}
"""The same arithmetic without paging, which loractl has only for QLoRA."""


def OPTIMIZER(draft: Draft, key: str, value: Any) -> None:  # noqa: N802 - a rule among rules
    """The optimizer by its name here; for LoRA, paged optimizers are not paged."""
    known = _OPTIMIZERS.get(value.lower()) if isinstance(value, str) else None
    if known is None:
        draft.leave(key, f"{short(value)}: loractl has no such optimizer, and uses its own default (training.optim)")
    else:
        draft.put(key, "training.optim", _UNPAGED.get(known, known) if draft.job["method"] == "lora" else known)
    if value == "adamw_torch_8bit":
        draft.differ(key, f"its 8-bit states are torchao's in {draft.tool}, and bitsandbytes' in loractl")


OWN_OPTIMIZER = "adamw_torch_fused"
"""What both tools use if the file names none. For QLoRA loractl uses another, in 8 bit."""


BF16 = choice(
    "training.dtype", {True: "bfloat16", "full": "bfloat16", "auto": None, False: None}, "no such number format"
)  # False is the whole file's business: see the tools' own modules


FP16 = choice("training.dtype", {True: "float16", False: None}, "no such number format")


BY_LENGTH = choice("training.train_sampling_strategy", {True: "group_by_length", False: None}, "rows are shuffled")


IN_ORDER = choice("training.train_sampling_strategy", {True: "sequential", False: None}, "rows are shuffled")


FRESH = only(False, "the training starts with a fresh adapter; lora.init_from names a stored one")


_CARD = "loractl divides a job over cards by itself (resources.cards); a step has as many rows as on one card"


def ONE_CARD(draft: Draft, key: str, value: Any) -> None:  # noqa: N802 - a rule among rules
    """How several cards divide a training: reported once, for the first key that says so."""
    if value is None or _CARD in draft.otherwise.values():
        draft.skip(key)
    else:
        draft.differ(key, _CARD)


def CARDS(draft: Draft, key: str, value: Any) -> None:  # noqa: N802 - a rule among rules
    """A number of cards, or of groups of them."""
    only(1, f"{short(value)}: {_CARD}")(draft, key, value)


ANSWERS = only(False, "only answers count in the loss")


TEMPLATE = only("tokenizer_default", "the tokenizer's own chat template is used")


def TOKENS(draft: Draft, key: str, value: Any) -> None:  # noqa: N802 - a rule among rules
    """Special tokens. A padding token changes nothing: padding is never learned."""
    if isinstance(value, dict) and value.keys() <= {"pad_token"}:
        draft.skip(key)
    else:
        draft.leave(key, "the tokenizer is used as it is")


def REMOTE(draft: Draft, key: str, value: Any) -> None:  # noqa: N802 - a rule among rules
    """Whether the model's own code may run: transformers has code for most models."""
    if value is False:
        draft.skip(key)
    else:
        draft.differ(key, "a model's own code runs only where the worker's owner allows it: LORACTL_TRUSTED_CODE")


_ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")


def ATTENTION(draft: Draft, key: str, value: Any) -> None:  # noqa: N802 - a rule among rules
    """What computes attention. If loractl does not have it, the model's usual attention takes its place: the sums are
    the same."""
    if value in _ATTENTION:
        draft.put(key, "training.attn_implementation", value)
    else:
        draft.skip(key)


def tell_tf32(draft: Draft, theirs: Mapping[str, Any]) -> None:
    """TF32 rounds only float32 products: it changes nothing in 16 bit."""
    if theirs.get("tf32") is True and get_key(draft.job, "training.dtype") == "float32":
        draft.differ("tf32", f"true: {draft.tool} rounds products of float32 to TF32, loractl does not")
    elif "tf32" in theirs:
        draft.skip("tf32")


QUANTISED = "loractl refuses weights that are already quantised: name the original model"


def tell_quantised(draft: Draft) -> None:
    """A base whose name says that it is already in 4 bit."""
    if found := re.search("gptq|awq|aqlm", name := str(draft.job["base_model"]), re.IGNORECASE):
        what = f"{short(name)} seems to be in 4 bit by {found[0].upper()}: {QUANTISED}, with method: qlora"
        draft.differ("base_model", what)


def short(value: Any) -> str:
    """A value in a line of text."""
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 40 else f"{text[:37]}..."


def get_key(tree: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key, or None."""
    here: Any = tree
    for part in key.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key."""
    *parents, last = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def unset_key(tree: dict[str, Any], key: str) -> None:
    """Remove a dotted key, if present."""
    *parents, last = key.split(".")
    for part in parents:
        tree = tree.get(part, {})
    tree.pop(last, None)
