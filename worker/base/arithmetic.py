"""How a model computes: the number formats of a run, sound NF4 layers, dropout, and evaluation that leaves no trace."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from loractl.common.job.status import Reason

from .failure import TrainingFailed
from .processor import has_bf16


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The number formats of a run."""

    base: torch.dtype  # of unquantised base weights, and NF4's compute type
    amp: Literal["bf16", "fp16"] | None  # autocast's compute type, over fp32 adapters


OVERFLOWS_FP16 = {
    "gemma2": "vllm-project/vllm, vllm/config/model.py: no float16; transformers' page of Gemma 2",
    "gemma3": "huggingface/transformers issue 39972: activations beyond 65,504",
    "gemma4": "unslothai/unsloth-zoo pull request 866: gradients",
    "glm4": "vllm-project/vllm, vllm/config/model.py: no float16",
    "glm4_moe": "unslothai/unsloth-zoo pull request 866: gradients",
    "gpt_oss": "microsoft/onnxruntime-genai pull request 2444: activations of the last layers",
    "plamo2": "vllm-project/vllm, vllm/config/model.py: no float16",
    "qwen2": "QwenLM/Qwen3 issues 670 (training), 826 and 868 (V100): activations and scores",
    "qwen3_5": "unslothai/unsloth, unsloth/models/loader.py: gradients",
    "qwen3_moe": "unslothai/unsloth-zoo pull request 866: gradients",
}
"""Families whose activations or gradients exceed float16's 65,504, since they were trained in bfloat16, with the source
for each. Names with such a prefix count, too: gemma3_text, qwen2_moe, qwen2_vl."""


def overflows_fp16(family: str) -> bool:
    """Whether models of this `model_type` go wrong in float16."""
    return family.startswith(tuple(OVERFLOWS_FP16))


def choose_precision(device: str, dtype: str = "auto", family: str = "") -> Precision:
    """bf16 if the device computes in it; else fp16 with loss scaling on a card, fp32 on a CPU.

    Cards before Ampere and old CPUs only emulate bf16: slower than fp32, and no more exact. A job's own choice takes
    precedence. `family`: the model's `model_type`; one that overflows fp16 uses fp32 if there is no bf16. Raises
    TrainingFailed(bad_spec) for float16 on a CPU, where autocast has no float16.
    """
    if dtype == "float32":
        return Precision(base=torch.float32, amp=None)
    if dtype == "bfloat16":
        return Precision(base=torch.bfloat16, amp="bf16")
    if dtype == "float16":
        if device != "cuda":
            raise TrainingFailed(Reason.BAD_SPEC, "training.dtype: float16 is for GPUs; use auto or float32 on a CPU")
        return Precision(base=torch.float16, amp="fp16")
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(base=torch.bfloat16, amp="bf16")
        if overflows_fp16(family):
            return Precision(base=torch.float32, amp=None)
        return Precision(base=torch.float16, amp="fp16")
    if has_bf16():
        return Precision(base=torch.bfloat16, amp="bf16")
    return Precision(base=torch.float32, amp=None)


AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compute_in(model: Any, precision: Precision) -> None:
    """Make the model's forward() compute in the run's formats: under autocast, with outputs in fp32."""
    from accelerate.utils import convert_outputs_to_fp32

    if precision.amp is not None:
        model.forward = convert_outputs_to_fp32(
            torch.autocast(model.device.type, dtype=AMP[precision.amp])(model.forward)
        )


def whole_modules(model: Any, compute: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast for modules trained in full, in fp32, on a base that computes in `compute`: `compute_in` covers only
    forward(), not generate()."""
    mixed = bool(model.peft_config["default"].modules_to_save) and compute != torch.float32
    return torch.autocast(model.device.type, dtype=compute, enabled=mixed)


def settle_nf4(base: Any, *, whole: bool = True) -> Any:
    """A base in NF4 with layers that stay sound. `whole`: what is not quantised goes to fp32, as in peft's recipe for
    QLoRA; else it keeps its 16 bits, and norms still compute in fp32."""
    from peft import prepare_model_for_kbit_training

    if whole:
        # The engine handles checkpointing: its non-reentrant kind needs no hook on the inputs.
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    keep_nf4_in_training_mode(base)
    return base


def keep_nf4_in_training_mode(model: Any) -> None:
    """Make eval() leave every NF4 layer in training mode; such a layer holds no dropout, so nothing else changes.

    bitsandbytes 0.50 on a CPU repacks a layer's weights for inference on its first forward in eval mode. From then on
    the gradients through it are wrong, without an error: training after a mid-run evaluation is ruined silently.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train(True)
            module.train = lambda mode=True, module=module: module


def draws(model: Any) -> bool:
    """Whether a model draws random numbers in training: for dropout, or for noise like a router's."""
    return any(_chances(module) for module in model.modules())


def stop_draws(model: Any) -> list[tuple[Any, str, float]]:
    """Let a model compute in training mode what it computes in eval mode. Returns what was set to zero: the object, the
    attribute's name and its value."""
    stopped = []
    for module in model.modules():
        # Falcon's and Persimmon's code reads some of the config's numbers in each pass
        for holder in (module, *([module.config] if hasattr(module, "config") else [])):
            for name in _chances(holder):
                stopped.append((holder, name, getattr(holder, name)))
                setattr(holder, name, 0.0)
    return stopped


@contextlib.contextmanager
def undrawing(model: Any) -> Iterator[None]:
    """Within the context the model draws no random numbers in training mode."""
    stopped = stop_draws(model)
    try:
        yield
    finally:
        for holder, name, value in stopped:
            setattr(holder, name, value)


def _chances(holder: Any) -> list[str]:
    """The attributes of a module or config that say how often or how much it draws: some models' code keeps only the
    number."""
    named = {name: value for name, value in vars(holder).items() if name == "p" or "drop" in name or "jitter" in name}
    return [name for name, value in named.items() if isinstance(value, float) and value > 0]


@contextlib.contextmanager
def evaluating(model: Any, *, base: bool = False) -> Iterator[Any]:
    """The model in eval mode without gradients; with `base`, its adapter switched off. Training mode is restored."""
    was_training = model.training
    model.eval()
    adapter_off = model.disable_adapter() if base else contextlib.nullcontext()
    try:
        with torch.no_grad(), adapter_off:
            yield model
    finally:
        model.train(was_training)


@contextlib.contextmanager
def trained_weights(model: Any, weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within the context the trained parameters have these weights, copied to the model's device."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    now = [parameter.data for parameter in trained]
    try:
        for parameter, weight in zip(trained, weights, strict=True):
            parameter.data = weight.to(parameter.device)
        yield
    finally:
        for parameter, weight in zip(trained, now, strict=True):
            parameter.data = weight


@contextlib.contextmanager
def random_streams_kept() -> Iterator[None]:
    """Restore every generator's state: dropout must not depend on whether something was tried or measured in between. A
    DataLoader draws a number for each pass, even without shuffling."""
    python, numbers, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
