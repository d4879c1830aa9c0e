"""A training's optimizer: its kind, what weight decay skips, and the loss scaler that float16 needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names

from loractl.common.memory.weights import state_bytes

ADEMAMIX_BETA3, ADEMAMIX_ALPHA = 0.9999, 5.0
"""transformers' values, for which the job file has no keys."""

UNDECAYED = ("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Names of parameters that weight decay skips: those of transformers' Trainer, so that a job file means the same
everywhere."""


def make_optimizer(model: Any, args: TrainingArguments) -> Any:
    """The optimizer of `args` over the model's trainable parameters; biases and norms are not decayed."""
    names = set(get_parameter_names(model, [torch.nn.LayerNorm], UNDECAYED))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in names], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained if name not in names], "weight_decay": 0.0},
    ]
    optimizer = _kind(args)(groups)
    if args.optim.value.endswith("_8bit"):
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        # trained embeddings get 32-bit state: in 8 bit they are unstable (arXiv:2110.02861, section 2.3)
        for module in _trained_embeddings(model):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def state_sizes(model: Any, optimizer: str) -> list[int]:
    """Bytes of the state that the optimizer of this name will keep for each trainable parameter of the model."""
    embeddings = {id(module.weight) for module in _trained_embeddings(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [state_bytes(optimizer, parameter.numel(), embedding=id(parameter) in embeddings) for parameter in trained]


def _trained_embeddings(model: Any) -> Iterator[torch.nn.Embedding]:
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight.requires_grad:
            yield module


def _kind(args: TrainingArguments) -> Callable[[Any], Any]:
    """The optimizer with a name of the job file, and its numbers, for groups of parameters."""
    from transformers.optimization import Adafactor

    name, lr = args.optim.value, {"lr": args.learning_rate}
    betas, eps = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
    plain: dict[str, Callable[[Any], Any]] = {
        "adamw_torch": lambda groups: torch.optim.AdamW(groups, **lr, betas=betas, eps=eps),
        "adamw_torch_fused": lambda groups: torch.optim.AdamW(groups, **lr, betas=betas, eps=eps, fused=True),
        "adafactor": lambda groups: Adafactor(groups, **lr, scale_parameter=False, relative_step=False),
        "adagrad": lambda groups: torch.optim.Adagrad(groups, **lr),
        "rmsprop": lambda groups: torch.optim.RMSprop(groups, **lr),
        "sgd": lambda groups: torch.optim.SGD(groups, **lr),
    }
    if name in plain:
        return plain[name]
    from bitsandbytes import optim as bnb

    kept = {"optim_bits": 8 if name.endswith("_8bit") else 32, "is_paged": name.startswith("paged_")}
    more = (*betas, ADEMAMIX_BETA3)
    ours: dict[str, Callable[[Any], Any]] = {
        "adamw": lambda groups: bnb.AdamW(groups, **lr, betas=betas, eps=eps, **kept),
        "lion": lambda groups: bnb.Lion(groups, **lr, betas=betas, **kept),
        "ademamix": lambda groups: bnb.AdEMAMix(groups, **lr, betas=more, alpha=ADEMAMIX_ALPHA, eps=eps, **kept),
    }
    return ours[name.removeprefix("paged_").partition("_")[0]]


class ScaledOptimizer:
    """An optimizer with the loss scaler that float16 needs: a step whose gradients overflow is skipped, and the scale
    halved."""

    def __init__(self, optimizer: Any, scaler: Any = None) -> None:
        self.inner = optimizer
        self.scaler = scaler  # a torch.amp.GradScaler; None: gradients are not scaled
        self.step_was_skipped = False

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def clip(self, parameters: list[Any], most: float) -> torch.Tensor:
        """Scale the gradients to a norm of at most `most`. Returns their previous norm."""
        if self.scaler is not None:
            self.scaler.unscale_(self.inner)
        return torch.nn.utils.clip_grad_norm_(parameters, most)

    def step(self) -> None:
        with _without_waits(self.inner):
            if self.scaler is None:
                self.inner.step()
                return
            before = self.scaler.get_scale()
            self.scaler.step(self.inner)
        self.scaler.update()
        self.step_was_skipped = self.scaler.get_scale() < before

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.inner.state_dict(), "scaler": self.scaler.state_dict() if self.scaler else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["optimizer"])
        if self.scaler is not None and state["scaler"] is not None:  # else it was trained in another number format
            self.scaler.load_state_dict(state["scaler"])


@contextlib.contextmanager
def _without_waits(optimizer: Any) -> Iterator[None]:
    """bitsandbytes waits for the card after each tensor (optim/optimizer.py, step), 448 times for all layers of an 8B
    model. Its kernels run on the stream that a training uses for everything, so only paged state, which moves between
    memories, needs that."""
    if getattr(optimizer, "is_paged", True):
        yield
        return
    from bitsandbytes.optim import optimizer as library

    wait, library.sync_gpu = library.sync_gpu, lambda tensor: None
    try:
        yield
    finally:
        library.sync_gpu = wait
