"""A fresh LoRA adapter on a loaded base."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from loractl.common.adapter_config import is_module_name
from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.module_pattern import ModulePattern

from .arithmetic import settle_nf4, stop_draws
from .failure import TrainingFailed
from .model import HEAD
from .source import first_line, model_errors, source_of

INITIAL_WEIGHTS: dict[str, bool | str] = {"default": True, "loftq": True}
"""peft's names where ours differ; loftq's weights come later, from the base's own files."""


def add_adapter(base: Any, spec: JobSpec, method: Method) -> Any:
    """The base with a fresh LoRA adapter; only the adapter and the classifying head, if any, are trainable. Raises
    TrainingFailed(bad_spec)."""
    from peft import LoraConfig, get_peft_model

    if not spec.kind.base_draws:
        stop_draws(base)
    if method is Method.QLORA:
        base = settle_nf4(base, whole=spec.training.exact)
    targets = spec.lora.target_modules
    if isinstance(targets, list):
        _check_targets(base, targets)
    elif targets != "all-linear":
        targets = _names_of(base, targets)
    if wrong := [name for name in spec.lora.modules_to_save if not is_module_name(name)]:  # peft's own are expressions
        raise TrainingFailed(Reason.BAD_SPEC, f"lora.modules_to_save: {wrong[0]!r} is not a module name")
    config = LoraConfig(
        task_type=spec.kind.peft,  # for SEQ_CLS, peft itself adds the head to modules_to_save
        r=spec.lora.r,
        lora_alpha=spec.lora.lora_alpha,
        lora_dropout=spec.lora.lora_dropout,
        target_modules=targets,
        modules_to_save=spec.lora.modules_to_save or None,
        use_dora=spec.lora.use_dora,
        use_rslora=spec.lora.use_rslora,
        init_lora_weights=INITIAL_WEIGHTS.get(spec.lora.init_lora_weights, spec.lora.init_lora_weights),
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:  # what this peft can't do with this model, like dropout on fused experts
        raise TrainingFailed(Reason.BAD_SPEC, f"peft makes no adapter for this model: {first_line(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft leaves modules_to_save in the base's 16 bit, where small steps are lost
            parameter.data = parameter.data.float()
    if spec.lora.init_lora_weights == "loftq":
        _make_up_for_nf4(model, spec)
    # without a name: on each save peft would ask the hub whether the base's main branch has another vocabulary
    model.peft_config["default"].base_model_name_or_path = ""
    model.config.use_cache = False
    return model


def _names_of(base: Any, pattern: str) -> list[str]:
    """The names of the layers that an expression matches, for peft to find and store: the ends of paths if these match
    the same layers. Raises TrainingFailed(bad_spec)."""
    linear = set(_linear(base))
    try:
        found = ModulePattern(text=pattern).matches(name for name, _ in base.named_modules())
    except ValueError as error:
        raise TrainingFailed(Reason.BAD_SPEC, f"lora.target_modules: {pattern} {error}") from error
    if other := [name for name in found if name not in linear]:
        what = f"{pattern} matches {other[0]} too, which is not a linear layer of its blocks"
        raise TrainingFailed(Reason.BAD_SPEC, f"lora.target_modules: {what}")
    if not found:
        some = sorted(linear)[:: max(1, len(linear) // 2)]
        what = f"{pattern} matches no linear layer of this model; it matches whole names, like {', '.join(some)}"
        raise TrainingFailed(Reason.BAD_SPEC, f"lora.target_modules: {what}")
    for names in ({name.rpartition(".")[2] for name in found}, set(found)):
        if [name for name, _ in base.named_modules() if not names.isdisjoint(_ends(name))] == found:
            return sorted(names)
    what = f"{pattern} matches a layer whose name is the end of another's, which it does not match"
    raise TrainingFailed(Reason.BAD_SPEC, f"lora.target_modules: {what}")


def _ends(name: str) -> list[str]:
    """A module's name, and the ends of its path that peft would also recognise."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _linear(base: Any) -> list[str]:
    """The full names of the layers that take an adapter."""
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D)  # GPT-2's layers are Conv1D
    named = [name for name, module in base.named_modules() if isinstance(module, kinds)]
    return [name for name in named if name.rpartition(".")[2] not in ("lm_head", HEAD)]


def _check_targets(base: Any, targets: list[str]) -> None:
    linear = {name.rpartition(".")[2] for name in _linear(base)}
    if unknown := [t for t in targets if t.rpartition(".")[2] not in linear]:
        raise TrainingFailed(
            Reason.BAD_SPEC,
            f"lora.target_modules: {', '.join(unknown)} is not a linear layer of this model; "
            f"it has {', '.join(sorted(linear))}",
        )


def _make_up_for_nf4(model: Any, spec: JobSpec) -> None:
    """Start A and B as the best rank-r correction of what NF4 lost in each layer (LoftQ, arXiv:2310.08659, with one
    step; peft's own needs CUDA). Raises TrainingFailed."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return  # a trace: it has no weights
    whole = _weights_of(spec)
    for name, layer in layers:
        key = f"{name.removeprefix('base_model.model.')}.weight"
        if key not in whole:
            what = f"the base's files have no {key}, so what NF4 lost of it is not known; use default"
            raise TrainingFailed(Reason.BAD_SPEC, f"lora.init_lora_weights: {what}")
        packed = layer.get_base_layer().weight
        kept = dequantize_4bit(packed.data, packed.quant_state).float()
        lost = whole[key]().to(kept.device, torch.float32) - kept
        r, scale = spec.lora.r, layer.scaling["default"]
        # the r largest of a few more, by random projections (arXiv:0909.4061): all singular values of an 8B model's
        # layers take minutes, and the job holds a card for that time
        left, sizes, right = torch.svd_lowrank(lost, q=min(4 * r, *lost.shape), niter=4)
        root, a, b = sizes[:r].sqrt(), layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        # a layer narrower than r has fewer: the rest of A and B stays as peft initialized it
        a[: len(root)] = root[:, None] * right.T[:r]
        b[:, : len(root)] = left[:, :r] * root / scale
        if spec.lora.use_dora:  # its magnitudes are norms of the layer with the new A and B
            layer.lora_magnitude_vector["default"].weight.data = torch.linalg.norm(kept + scale * (b @ a), dim=1)


def _weights_of(spec: JobSpec) -> dict[str, Callable[[], torch.Tensor]]:
    """The tensors of the base's safetensors files by name, each read when called. Raises TrainingFailed."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    with model_errors(spec.base_model):
        where = source_of(spec.base_model, spec.revision)
        single = cached_file(spec.base_model, "model.safetensors", _raise_exceptions_for_missing_entries=False, **where)
        if single is None:
            index = cached_file(spec.base_model, "model.safetensors.index.json", **where)
            files, _ = get_checkpoint_shard_files(spec.base_model, index, **where)
        else:
            files = [single]
        opened = [safe_open(file, framework="pt") for file in files]
    names = [(file, key) for file in opened for key in file.keys()]  # type: ignore[no-untyped-call]  # noqa: SIM118
    return {key: functools.partial(file.get_tensor, key) for file, key in names}
