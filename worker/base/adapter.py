"""The adapter's files in the store: weights as safetensors, with the peft settings needed for loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loractl.common.adapter_config import CONFIG, LABELS, SUFFIXES, allowed, check_adapter_config, portable_name
from loractl.common.errors import ArtifactError
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason

from .failure import TrainingFailed

WEIGHTS = "adapter_model.safetensors"


def save_adapter(model: Any, tokenizer: Any, spec: JobSpec, folder: Path) -> None:
    """Write the adapter and its tokenizer into `folder`, and load it once. Raises TrainingFailed if that fails."""
    # peft's README.md would be an empty form that names the base's path on this box; the model card is written later
    model.create_or_update_model_card = lambda _: None  # it is half of what saving takes
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    # the allowed keys; the base is what the job named, not its path on this box
    written = json.loads((folder / CONFIG).read_text("utf-8"))
    kept = allowed(written) | {"base_model_name_or_path": portable_name(spec.base_model), "revision": spec.revision}
    if isinstance(targets := kept.get("target_modules"), list):
        kept["target_modules"] = sorted(targets)
    (folder / CONFIG).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", "utf-8")
    for path in list(folder.rglob("*")):
        if path.is_file() and path.suffix not in SUFFIXES:
            path.unlink()
    check_adapter(model, folder)


def read_labels(folder: Path) -> tuple[str, ...]:
    """A stored classifier's labels, in the order of its head. Raises ArtifactError."""
    try:
        labels = json.loads((folder / LABELS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"the adapter's {LABELS} can't be read: {error}") from None
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(name, str) for name in labels):
        raise ArtifactError(f"the adapter's {LABELS} is not a list of labels")
    return tuple(labels)


def check_adapter(model: Any, folder: Path) -> None:
    """Load a saved adapter as its users will: peft reads its settings. Every tensor must equal the trained one, bit for
    bit. Raises TrainingFailed."""
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_adapter_config(folder / CONFIG)
        settings = PeftConfig.from_pretrained(str(folder))
        saved = load_file(folder / WEIGHTS)
    except (ArtifactError, OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise TrainingFailed(Reason.TRAINER_ERROR, f"the saved adapter does not load: {error}") from error
    own = model.peft_config["default"]
    wrong = [key for key in ("peft_type", "r", "lora_alpha") if getattr(settings, key, None) != getattr(own, key)]
    if wrong := [*wrong, *differing(model, saved)]:
        raise TrainingFailed(Reason.TRAINER_ERROR, f"the saved adapter is not what was trained: {wrong[0]} differs")


def differing(model: Any, saved: dict[str, Any]) -> list[str]:
    """The tensors that only one of them has, or that are not equal bit for bit."""
    import torch
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model)
    unequal = [name for name in saved.keys() & own.keys() if not torch.equal(saved[name], own[name].cpu())]
    return sorted(saved.keys() ^ own.keys()) + unequal


def load_weights(model: Any, path: Path) -> None:
    """The adapter's weights that `save_weights` or peft wrote. Raises OSError."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(path))


def load_stored(model: Any, path: Path) -> None:
    """Put a stored adapter's weights in place of fresh ones. Raises TrainingFailed(bad_spec) if they do not fit."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingFailed(Reason.BAD_SPEC, f"the stored adapter can't be read: {error}") from error
    own = get_peft_model_state_dict(model)
    if wrong := sorted(own.keys() ^ stored.keys()):
        where = "the stored adapter alone" if wrong[0] in stored else "this job's alone"
        raise TrainingFailed(Reason.BAD_SPEC, f"the stored adapter has other layers: {wrong[0]} is in {where}")
    for name, tensor in own.items():
        if tensor.shape != stored[name].shape:
            shapes = f"{list(stored[name].shape)}, here {list(tensor.shape)}"
            raise TrainingFailed(Reason.BAD_SPEC, f"the stored adapter has other shapes: {name} is {shapes}")
    set_peft_model_state_dict(model, stored)


def save_weights(model: Any, path: Path) -> None:
    """Save only the adapter's weights, to a temporary file that is then renamed."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    save_file(weights, aside)
    aside.rename(path)
