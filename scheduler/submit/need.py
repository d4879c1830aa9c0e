"""What a job will need: its plan, corrected by what was measured, and the methods open to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loractl.common.artifacts import sha256_of
from loractl.common.errors import UsageError
from loractl.common.job.method import Method, Need, Ways, least_need, permitted_methods, within
from loractl.common.job.spec import JobSpec
from loractl.common.memory.config import HOW_TO_NAME_IT, foreign_format, read_shape
from loractl.common.memory.fit import memory_plan, plan_ways
from loractl.common.memory.shape import Shape
from loractl.common.memory.step import Stack
from loractl.common.module_pattern import ModulePattern
from loractl.common.settings import Settings
from loractl.common.store.records import Submission
from loractl.common.store.store import Store
from loractl.common.units import gib

from .ancestor import settle_predecessors

ABSURD = 2**50
"""Bytes that no card will have; the database's numbers end not far above."""


def plan_job(
    spec: JobSpec,
    user: str,
    data: dict[str, Any],
    store: Store | None,
    devices: str | None = None,
    beside: Mapping[str, JobSpec] | None = None,
    before: JobSpec | None = None,
) -> Submission:
    """Everything that submit writes about a job. `store`: None if a dry run has no database to ask. `devices`: see
    own_devices. `beside`: the jobs of the same submit by name. `before`: of a job submitted before, its spec until now.

    Raises UsageError if its own max_vram is less than it needs with any method, or if lora.init_from does not fit.
    """
    spec = settle_predecessors(spec, store, beside, before=before)
    check_adapter(spec)
    stack = fleet_stack(store, devices)
    plan = memory_plan(spec, data, stack, store.attempts.measured if store and stack.on_gpu else lambda *_: [])
    methods = open_methods(spec)
    if (least := least_need(methods, plan.need) or 0) > ABSURD:
        raise UsageError(
            f"{spec.name} needs {gib(least)} GiB by its plan, which no card has",
            "lower dataset.max_length or training.per_device_train_batch_size, or look at the base's config.json",
        )
    admitted, ways = admit(spec, methods, plan.planned, plan.need)
    return Submission(spec=spec, user=user, data=data, plan=plan, methods=admitted, ways=ways)


def own_devices(settings: Settings) -> str | None:
    """LORACTL_DEVICES, or cpu if the workers are on this machine and it has no NVIDIA driver; None: unknown."""
    if settings.devices is None and settings.embedded_database and not any(map(os.path.exists, _DRIVERS)):
        return "cpu"
    return settings.devices


_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
"""The NVIDIA driver's device files, the second under WSL."""


def fleet_stack(store: Store | None, devices: str | None = None) -> Stack:
    """How the fleet trains: on CPUs if workers report nothing else. If none reports anything now, `devices` decides,
    see own_devices."""
    kinds = {node.kind for node in store.cards.nodes()} if store is not None else set()
    return Stack(on_gpu=kinds != {"cpu"} if kinds else devices != "cpu")


def admit(spec: JobSpec, methods: Sequence[Method], planned: Need, need: Need) -> tuple[tuple[Method, ...], Ways]:
    """The methods and the numbers of cards that the job's own max_vram leaves. `planned`, `need`: see plan_ways.

    Raises UsageError when it leaves none.
    """
    ways = plan_ways(spec, methods, planned, need)
    if not ways.alone and not ways.gangs:
        raise UsageError(
            f"{spec.name} needs more of each of its {spec.resources.cards} cards than its resources.max_vram, "
            f"{gib(spec.resources.max_vram)} GiB",
            "raise it, or ask for more cards",
        )
    return _admitted(spec, methods, need) if ways.alone else tuple(methods), ways


def _admitted(spec: JobSpec, methods: Sequence[Method], need: Need) -> tuple[Method, ...]:
    admitted = within(methods, need, spec.resources.max_vram)
    if not admitted:
        raise UsageError(
            f"{spec.name} needs {gib(least_need(methods, need))} GiB by its plan, its resources.max_vram is "
            f"{gib(spec.resources.max_vram)}",
            "raise it, or lower dataset.max_length or training.per_device_train_batch_size",
        )
    return admitted


def check_adapter(spec: JobSpec) -> None:
    """Refuse a base in a foreign format, and an adapter that peft can't put on the base, if its config.json is here.

    Raises UsageError.
    """
    if (format := foreign_format(spec.base_model, spec.revision)) is not None:
        raise UsageError(
            f"base_model {spec.base_model} is quantised with {format}, which can't be trained on", HOW_TO_NAME_IT
        )
    shape = read_shape(spec.base_model, spec.revision)
    if shape is None:
        return
    targets = spec.lora.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        _check_expression(targets, shape, spec.base_model)
    elif isinstance(targets, list) and (unknown := [name for name in targets if not shape.adapted([name])]):
        names = sorted({layer.name.rpartition(".")[2] for layer, _ in shape.adapted("all-linear")})
        raise UsageError(
            f"lora.target_modules: {', '.join(unknown)} is not a linear layer of {spec.base_model}",
            f"it has {', '.join(names)}; or write all-linear",
        )
    fused = any(block.experts and block.experts.adapted for block in shape.blocks)
    if targets == "all-linear" and fused and spec.lora.use_dora:
        raise UsageError(
            f"{spec.base_model} has fused experts, which peft can't adapt with DoRA",
            "set lora.use_dora: false, or name the layers to adapt in lora.target_modules, like [q_proj, v_proj]",
        )
    if targets == "all-linear" and fused and spec.lora.lora_dropout > 0:
        raise UsageError(
            f"{spec.base_model} has fused experts, which peft adapts only without dropout",
            "set lora.lora_dropout: 0, or name the layers to adapt in lora.target_modules, like [q_proj, v_proj]",
        )


def _check_expression(pattern: str, shape: Shape, base: str) -> None:
    """Refuse an expression that takes too long, or reaches no layer. Raises UsageError."""
    names = [name for block in shape.blocks for layer in block.linears for name in block.names(layer)]
    try:
        found = ModulePattern(text=pattern).matches(names)
    except ValueError as error:
        raise UsageError(f"lora.target_modules: {pattern} {error}") from error
    if not found:
        raise UsageError(
            f"lora.target_modules: {pattern} matches no linear layer of {base}",
            f"it matches whole names, like {', '.join(dict.fromkeys(names[:: max(1, len(names) // 2)]))}; "
            "or write all-linear",
        )


def open_methods(spec: JobSpec) -> tuple[Method, ...]:
    """The job's methods, without QLoRA if its base is a GGUF file, which can't be quantised to NF4."""
    methods = permitted_methods(spec.method)
    folder = Path(spec.base_model)
    gguf_alone = folder.is_dir() and any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))
    return tuple(m for m in methods if m is not Method.QLORA) or methods if gguf_alone else methods


def stored_hashes(spec: JobSpec) -> dict[str, Any]:
    """The hashes that the local data sets will have once stored: they identify a job like it."""
    return {key: {"sha256": sha256_of(Path(text))} for key, text in spec.data_sets().items() if Path(text).is_file()}
