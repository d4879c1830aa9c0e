"""The memory plan: a training's peak in device memory, predicted from the model's config.json alone.

Counts a decoder-only transformer of the Llama kind (Llama, Mistral, Qwen2, SmolLM and their relatives). For a config
that it does not know it returns None and the job is tried where anything fits: a guess would be worse than no number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .policy import Need
from .spec import JobSpec, Method

NF4_BYTES = 0.5 + (1 / 64) + 4 / (64 * 256)
"""Bytes per NF4 weight with double quantisation: 4 bit, an 8-bit absmax per 64, a 32-bit one per 256 of those
(QLoRA, arXiv:2305.14314, section 3; bitsandbytes' block sizes)."""

ADAPTER_BYTES = 16
"""Bytes per LoRA parameter: fp32 weight and gradient (peft keeps adapters in fp32) and AdamW's two fp32 moments."""

ADAPTER_BYTES_8BIT = 4 + 4 + 2
"""The same with 8-bit AdamW: two moments of one byte each."""

CONTEXT_BYTES = 500 * 2**20
"""A CUDA context with cuBLAS workspaces: 0.15 to 0.5 GiB by card; the upper end."""

ALLOCATOR_SLACK = 0.10
"""What the caching allocator reserves beyond what is allocated: at least 8% in published runs."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the plan needs to know of a model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool

    @property
    def linear_per_layer(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer in one block: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, q),
            (self.hidden, kv),
            (self.hidden, kv),
            (q, self.hidden),
            (self.hidden, self.ffn),
            (self.hidden, self.ffn),
            (self.ffn, self.hidden),
        ]

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(a * b for a, b in self.linear_per_layer)

    @property
    def other_parameters(self) -> int:
        """Embeddings, output head when it is not tied, norms: what NF4 leaves alone."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden


_LLAMA_KIND = {"llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "granite", "olmo2"}


def read_shape(model_folder: Path) -> Shape | None:
    """The shape in a folder's config.json; None when there is none or its kind is not known."""
    try:
        config: Any = json.loads((model_folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or config.get("model_type") not in _LLAMA_KIND:
        return None
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Shape(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            ffn=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def plan(shape: Shape, spec: JobSpec, method: Method) -> dict[str, int]:
    """Bytes by part at the training's peak, for a GPU (bf16 compute, gradient checkpointing unless refused)."""
    quantised = method is Method.QLORA
    tokens = spec.training.per_device_train_batch_size * spec.dataset.max_length
    eval_tokens = spec.evaluation.per_device_eval_batch_size * spec.dataset.max_length
    weights = (
        shape.linear_parameters * NF4_BYTES + shape.other_parameters * 4  # kbit preparation casts the rest to fp32
        if quantised
        else (shape.linear_parameters + shape.other_parameters) * 2
    )
    paged = spec.training.optim == "paged_adamw_8bit" or (spec.training.optim == "auto" and quantised)
    eight_bit = paged or spec.training.optim == "adamw_8bit"
    adapter = _adapter_parameters(shape, spec) * (ADAPTER_BYTES_8BIT if eight_bit else ADAPTER_BYTES)
    # One block's saved tensors, in 16 bit: about 12 of the hidden size, q and o, k and v, and 3 of the MLP's width.
    block = (
        tokens
        * 2
        * (12 * shape.hidden + 3 * shape.heads * shape.head_dim + shape.kv_heads * shape.head_dim + 3 * shape.ffn)
    )
    stored = tokens * shape.hidden * (4 if quantised else 2) * shape.layers
    activations = shape.layers * block if spec.training.gradient_checkpointing is False else stored + block
    # The loss holds 16-bit and fp32 logits, their softmax and the gradient: 14 bytes an element, 16 on an fp32 head.
    # Evaluation holds the logits once, in fp32 on an fp32 head, and a copy of the learned ones.
    logits = shape.vocab * max(tokens * (16 if quantised else 14), eval_tokens * (8 if quantised else 4))
    parts = {"weights": weights, "adapter_and_optimizer": adapter, "activations": activations, "logits": logits}
    allocated = sum(parts.values())
    parts["context_and_slack"] = CONTEXT_BYTES + ALLOCATOR_SLACK * allocated
    return {name: int(size) for name, size in parts.items()}


def predict(spec: JobSpec) -> Need:
    """The job's need by method; unknown where the base model is not a folder here, or its kind is not known."""
    shape = read_shape(Path(spec.base_model))
    if shape is None:
        return Need(lora=None, qlora=None)
    return Need(lora=sum(plan(shape, spec, Method.LORA).values()), qlora=sum(plan(shape, spec, Method.QLORA).values()))


def _adapter_parameters(shape: Shape, spec: JobSpec) -> int:
    """r (in + out) for each adapted layer; named target modules are counted as if all were named."""
    return shape.layers * sum(spec.lora.r * (a + b) for a, b in shape.linear_per_layer)
