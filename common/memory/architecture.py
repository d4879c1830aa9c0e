"""What a base model is made of, read from its config.json alone: parameters by kind, and its linear layers by name.

The counts are those of transformers 5, peft 0.21 and bitsandbytes 0.50, checked against the real classes on the meta
device in tests/integration/test_memory_trace.py. A config of another kind gives None: a guess would be worse.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Config = Mapping[str, Any]

ROUTER_FACTOR = 1
"""peft gives an expert layer's router the job's own rank."""
GATE_UP_FACTOR = 2
"""peft doubles the rank on a fused gate_up_proj: it stands for two layers of the original checkpoint
(peft/utils/transformers_weight_conversion.py)."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear layer of a block; `name` is its path inside the block."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    quantised: bool = True  # bitsandbytes replaces plain nn.Linear and GPT-2's Conv1D, no other class

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Experts fused into two parameters of three dimensions, which bitsandbytes does not see."""

    count: int
    chosen: int  # per token
    hidden: int
    ffn: int  # width of one expert
    adapted: bool  # whether peft's all-linear reaches them, as it does where it knows the checkpoint's old layout

    @property
    def weights(self) -> int:
        return 3 * self.count * self.hidden * self.ffn

    @property
    def router(self) -> int:
        return self.count * self.hidden

    def adapter_parameters(self, r: int) -> int:
        """LoRA weights on router, gate_up_proj and down_proj (peft's ParamWrapper: one pair of factors an expert)."""
        router = ROUTER_FACTOR * r * (self.hidden + self.count)
        gate_up = GATE_UP_FACTOR * r * self.count * (self.hidden + 2 * self.ffn)
        return router + gate_up + r * self.count * (self.ffn + self.hidden)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A transformer block and how often it stands in the model."""

    count: int
    linears: tuple[Linear, ...]
    norms: int  # parameters of its norms
    experts: Experts | None = None
    text: bool = True  # False: a vision tower, which holds weights and adapters but sees no token

    @property
    def quantisable(self) -> int:
        return sum(layer.weights for layer in self.linears if layer.quantised)

    @property
    def other(self) -> int:
        fused = self.experts.weights + self.experts.router if self.experts else 0
        unseen = sum(layer.weights for layer in self.linears if not layer.quantised)
        return fused + unseen + self.norms + sum(layer.outputs for layer in self.linears if layer.bias)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the memory plan needs to know of a model. Sizes are numbers of elements."""

    family: str  # config.json's model_type
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the output head is the embedding
    blocks: tuple[Block, ...]
    outside: int = 0  # parameters beside blocks, embedding and head: final norm, positions, a tower's ends
    norm: Literal["rms", "layer"] = "rms"
    norms_per_block: int = 2  # over the hidden size
    head_norms: bool = False  # norms on queries and keys
    gated: bool = True  # the MLP multiplies an activated gate with a second projection
    attention: Literal["sdpa", "eager"] = "sdpa"  # what transformers takes where nothing is asked for
    softcaps: bool = False  # tanh caps on attention scores and logits (Gemma 2)
    alibi: bool = False  # positions as a mask of every head's own (Falcon)

    @property
    def fused_qkv(self) -> bool:
        """Queries, keys and values are slices of one layer's output, rotated where positions are rotary."""
        return self.family in ("phi3", "gpt_neox") or (self.family == "falcon" and not self.alibi)

    @property
    def single_key(self) -> bool:
        """One key head for all, left to torch to spread (Falcon's multi-query attention)."""
        return self.family == "falcon" and self.kv_heads == 1 and self.heads > 1

    @property
    def layers(self) -> int:
        return sum(block.count for block in self.blocks if block.text)

    @property
    def ffn(self) -> int:
        """Width of the widest dense MLP; of the chosen experts together where there is none."""
        return max(_width(block) for block in self.blocks if block.text)

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def linear_parameters(self) -> int:
        """Weights that NF4 replaces."""
        return sum(block.count * block.quantisable for block in self.blocks)

    @property
    def other_parameters(self) -> int:
        """All the rest: embedding, head, norms, biases, fused experts, linear layers of a class of their own."""
        ends = self.embedding * (1 if self.tied else 2) + self.outside
        return ends + sum(block.count * block.other for block in self.blocks)

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    def adapted(self, targets: Literal["all-linear"] | Iterable[str]) -> list[tuple[Linear, int]]:
        """The linear layers that an adapter reaches, each with how often it stands in the model.

        A target names a layer when it is its path or the path's end (peft's check_target_module_exists).
        """
        every = [(layer, block.count) for block in self.blocks for layer in block.linears]
        if targets == "all-linear":
            return every
        wanted = tuple(targets)
        return [(layer, count) for layer, count in every if any(_names(target, layer.name) for target in wanted)]

    def adapter_parameters(self, r: int, targets: Literal["all-linear"] | Iterable[str]) -> int:
        """Trained parameters of a LoRA adapter: r (in + out) a layer (arXiv:2106.09685, section 4.1)."""
        targets = targets if targets == "all-linear" else tuple(targets)
        dense = sum(count * r * (layer.inputs + layer.outputs) for layer, count in self.adapted(targets))
        if targets != "all-linear":
            return dense
        fused = [(b.experts, b.count) for b in self.blocks if b.experts and b.experts.adapted]
        return dense + sum(count * experts.adapter_parameters(r) for experts, count in fused)


def read_shape(model: str | Path, revision: str | None = None) -> Shape | None:
    """The shape of a model in a folder, or of a hub id whose config.json the local cache holds; None if unknown."""
    path = find_config(model, revision)
    if path is None:
        return None
    try:
        return shape_of(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return None


def find_config(model: str | Path, revision: str | None = None) -> Path | None:
    """config.json of a folder, or of a hub id at a revision (None: main, else the newest) in the local cache."""
    folder = Path(model)
    if (folder / "config.json").is_file():
        return folder / "config.json"
    if folder.is_absolute() or folder.exists():
        return None
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repository = cache / f"models--{str(model).replace('/', '--')}"
    try:
        if (pinned := repository / "snapshots" / _commit_of(repository, revision or "main") / "config.json").is_file():
            return pinned
        if revision is not None:
            return None  # what the cache has is of another revision
        found = list(repository.glob("snapshots/*/config.json"))
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    except (OSError, ValueError):
        return None


def _commit_of(repository: Path, revision: str) -> str:
    """What a branch or tag meant when it was last asked for; a commit is its own name."""
    ref = repository / "refs" / revision
    return ref.read_text("utf-8").strip() if ".." not in revision and ref.is_file() else revision


def shape_of(config: Any) -> Shape | None:
    """The shape in a parsed config.json; None for a kind that is not known, or a config that can't be right."""
    if not isinstance(config, dict):
        return None
    family = config.get("model_type")
    read = _READERS.get(family) if isinstance(family, str) else None
    if read is None:
        return None
    try:
        shape = read({**_DEFAULTS.get(str(family), {}), **config})
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError):
        return None
    sizes = (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.vocab, shape.layers)
    return shape if all(size > 0 for size in sizes) else None


def _llama_kind(config: Config) -> Shape:
    """Llama and its relatives: separate q, k, v, o and a gated MLP, or experts in its place."""
    family = str(config["model_type"])
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads, kv_heads, head_dim = _heads(config, hidden)
    bias = bool(config.get("attention_bias", False))
    qkv_bias = bool(config.get("qkv_bias", True)) if family in ("qwen2", "qwen2_moe") else bias
    attention = _attention(hidden, heads * head_dim, kv_heads * head_dim, qkv_bias, o_bias=bias)
    norms_per_block = 4 if family.startswith(("gemma2", "gemma3")) else 2
    head_norms = family in ("qwen3", "qwen3_moe", "gemma3_text", "olmo2")
    norms = norms_per_block * hidden
    if family == "olmo2":
        norms += (heads + kv_heads) * head_dim  # over all heads at once
    elif head_norms:
        norms += 2 * head_dim
    return Shape(
        family=family,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=int(config["vocab_size"]),
        tied=_tied(config),
        blocks=tuple(_feed_forward(config, family, hidden, layers, attention, norms)),
        outside=hidden,
        norms_per_block=norms_per_block,
        head_norms=head_norms,
        attention="eager" if family == "gemma2" else "sdpa",  # transformers turns sdpa off where scores are capped
        softcaps=family == "gemma2",
    )


def _feed_forward(
    config: Config, family: str, hidden: int, layers: int, attention: tuple[Linear, ...], norms: int
) -> list[Block]:
    """The blocks with their MLPs; of a mixture of experts the sparse and the dense ones (decoder_sparse_step)."""
    ffn = int(config["intermediate_size"])
    dense = attention + _gated_mlp(hidden, ffn, bool(config.get("mlp_bias", False)))
    if family not in _EXPERTS:
        return [Block(count=layers, linears=dense, norms=norms)]
    experts = Experts(
        count=int(config.get("num_local_experts") or config["num_experts"]),
        chosen=int(config["num_experts_per_tok"]),
        hidden=hidden,
        ffn=ffn if family == "mixtral" else int(config["moe_intermediate_size"]),
        adapted=family != "qwen2_moe",
    )
    sparse = attention
    if family == "qwen2_moe":
        shared = _gated_mlp(hidden, int(config["shared_expert_intermediate_size"]), False, "mlp.shared_expert")
        sparse += (*shared, Linear(name="mlp.shared_expert_gate", inputs=hidden, outputs=1))
    step, only = int(config.get("decoder_sparse_step") or 1), set(config.get("mlp_only_layers") or [])
    count = sum(1 for n in range(layers) if n not in only and (n + 1) % step == 0)
    blocks = [Block(count=count, linears=sparse, norms=norms, experts=experts)] if count else []
    return blocks + ([Block(count=layers - count, linears=dense, norms=norms)] if count < layers else [])


def _phi3(config: Config) -> Shape:
    """Phi-3: q, k, v in one layer, gate and up in another."""
    hidden, ffn = int(config["hidden_size"]), int(config["intermediate_size"])
    heads, kv_heads, head_dim = _heads(config, hidden)
    linears = (
        Linear(name="self_attn.o_proj", inputs=heads * head_dim, outputs=hidden),
        Linear(name="self_attn.qkv_proj", inputs=hidden, outputs=(heads + 2 * kv_heads) * head_dim),
        Linear(name="mlp.gate_up_proj", inputs=hidden, outputs=2 * ffn),
        Linear(name="mlp.down_proj", inputs=ffn, outputs=hidden),
    )
    return Shape(
        family="phi3",
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=int(config["vocab_size"]),
        tied=_tied(config),
        blocks=(Block(count=int(config["num_hidden_layers"]), linears=linears, norms=2 * hidden),),
        outside=hidden,
    )


def _gpt2(config: Config) -> Shape:
    """GPT-2: learned positions, Conv1D in place of Linear (peft and bitsandbytes both know it)."""
    hidden, layers, heads = int(config["n_embd"]), int(config["n_layer"]), int(config["n_head"])
    ffn = int(config.get("n_inner") or 4 * hidden)
    linears = (
        Linear(name="attn.c_attn", inputs=hidden, outputs=3 * hidden, bias=True),
        Linear(name="attn.c_proj", inputs=hidden, outputs=hidden, bias=True),
        Linear(name="mlp.c_fc", inputs=hidden, outputs=ffn, bias=True),
        Linear(name="mlp.c_proj", inputs=ffn, outputs=hidden, bias=True),
    )
    return Shape(
        family="gpt2",
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=int(config["vocab_size"]),
        tied=_tied(config),
        blocks=(Block(count=layers, linears=linears, norms=4 * hidden),),
        outside=2 * hidden + int(config["n_positions"]) * hidden,
        norm="layer",
        gated=False,
    )


def _gpt_neox(config: Config) -> Shape:
    hidden, layers, heads = (int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    bias = bool(config.get("attention_bias", True))
    linears = _fused_block("attention", hidden, 3 * hidden, int(config["intermediate_size"]), bias, mlp_bias=True)
    return Shape(
        family="gpt_neox",
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=int(config["vocab_size"]),
        tied=_tied(config),
        blocks=(Block(count=layers, linears=linears, norms=4 * hidden),),
        outside=2 * hidden,
        norm="layer",
        gated=False,
    )


def _falcon(config: Config) -> Shape:
    """Falcon: its linear layers are of a class of their own, so bitsandbytes quantises none of them."""
    hidden, layers, heads = (int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    head_dim, bias = hidden // heads, bool(config.get("bias", False))
    new, parallel = bool(config.get("new_decoder_architecture")), bool(config.get("parallel_attn", True))
    shared = 1 if config.get("multi_query", True) else heads
    kv_heads = int(config.get("num_kv_heads") or heads) if new else shared
    ffn = int(config.get("ffn_hidden_size") or 4 * hidden)
    linears = _fused_block(
        "self_attention", hidden, (heads + 2 * kv_heads) * head_dim, ffn, bias, mlp_bias=bias, quantised=False
    )
    two = int(config.get("num_ln_in_parallel_attn") or 2) == 2 if new else not parallel
    return Shape(
        family="falcon",
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=int(config["vocab_size"]),
        tied=_tied(config),
        blocks=(Block(count=layers, linears=linears, norms=(4 if two else 2) * hidden),),
        outside=2 * hidden,
        norm="layer",
        norms_per_block=2 if two else 1,
        gated=False,
        alibi=bool(config.get("alibi", False)),
    )


def _gemma3(config: Config) -> Shape:
    """Gemma 3 with a vision tower: its text model is nested; peft adapts the tower's layers too."""
    nested = {"model_type": "gemma3_text", **config["text_config"]}
    text = shape_of(nested)
    vision = {**_DEFAULTS["siglip_vision_model"], **(config.get("vision_config") or {})}
    if text is None:
        raise ValueError("text_config")
    hidden, ffn = int(vision["hidden_size"]), int(vision["intermediate_size"])
    patch = int(vision["patch_size"])
    attention = [
        Linear(name=f"self_attn.{name}_proj", inputs=hidden, outputs=hidden, bias=True) for name in ("k", "v", "q")
    ]
    mlp = (
        Linear(name="mlp.fc1", inputs=hidden, outputs=ffn, bias=True),
        Linear(name="mlp.fc2", inputs=ffn, outputs=hidden, bias=True),
    )
    attention.append(Linear(name="self_attn.out_proj", inputs=hidden, outputs=hidden, bias=True))
    tower = [
        Block(count=int(vision["num_hidden_layers"]), linears=(*attention, *mlp), norms=4 * hidden, text=False),
    ]
    ends = int(vision["num_channels"]) * patch**2 * hidden + hidden  # patch embedding
    ends += (int(vision["image_size"]) // patch) ** 2 * hidden + 2 * hidden  # positions, last norm
    ends += hidden * text.hidden + hidden  # projector and its norm
    if vision["vision_use_head"]:  # pooling by attention: a probe, fused q, k, v, and an MLP
        pooled = Linear(name="attention.out_proj", inputs=hidden, outputs=hidden, bias=True, quantised=False)
        tower.append(Block(count=1, linears=(pooled, *mlp), norms=2 * hidden, text=False))
        ends += hidden + 3 * hidden * hidden + 3 * hidden
    return Shape(
        family="gemma3",
        hidden=text.hidden,
        heads=text.heads,
        kv_heads=text.kv_heads,
        head_dim=text.head_dim,
        vocab=text.vocab,
        tied=_tied(config),
        blocks=(*text.blocks, *tower),
        outside=text.outside + ends,
        norms_per_block=text.norms_per_block,
        head_norms=True,
    )


def _heads(config: Config, hidden: int) -> tuple[int, int, int]:
    heads = int(config["num_attention_heads"])
    return heads, int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or hidden // heads)


def _tied(config: Config) -> bool:
    return bool(config.get("tie_word_embeddings", config["model_type"] in _TIED))


def _attention(hidden: int, q: int, kv: int, qkv_bias: bool, o_bias: bool) -> tuple[Linear, ...]:
    return (
        Linear(name="self_attn.q_proj", inputs=hidden, outputs=q, bias=qkv_bias),
        Linear(name="self_attn.k_proj", inputs=hidden, outputs=kv, bias=qkv_bias),
        Linear(name="self_attn.v_proj", inputs=hidden, outputs=kv, bias=qkv_bias),
        Linear(name="self_attn.o_proj", inputs=q, outputs=hidden, bias=o_bias),
    )


def _gated_mlp(hidden: int, ffn: int, bias: bool, path: str = "mlp") -> tuple[Linear, ...]:
    return (
        Linear(name=f"{path}.gate_proj", inputs=hidden, outputs=ffn, bias=bias),
        Linear(name=f"{path}.up_proj", inputs=hidden, outputs=ffn, bias=bias),
        Linear(name=f"{path}.down_proj", inputs=ffn, outputs=hidden, bias=bias),
    )


def _fused_block(
    path: str, hidden: int, qkv: int, ffn: int, bias: bool, *, mlp_bias: bool, quantised: bool = True
) -> tuple[Linear, ...]:
    """GPT-NeoX's and Falcon's four layers."""
    sizes = (
        (f"{path}.query_key_value", hidden, qkv, bias),
        (f"{path}.dense", hidden, hidden, bias),
        ("mlp.dense_h_to_4h", hidden, ffn, mlp_bias),
        ("mlp.dense_4h_to_h", ffn, hidden, mlp_bias),
    )
    return tuple(Linear(name=n, inputs=i, outputs=o, bias=b, quantised=quantised) for n, i, o, b in sizes)


def _names(target: str, name: str) -> bool:
    return target == name or name.endswith(f".{target}") or target.endswith(f".{name}")


def _width(block: Block) -> int:
    dense = max((layer.inputs for layer in block.linears if layer.name.startswith("mlp.")), default=0)
    return max(dense, block.experts.chosen * block.experts.ffn if block.experts else 0)


_EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe"}

_TIED = {"gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "falcon", "smollm3"}
"""Families whose config class ties head and embedding where config.json does not say."""

_GEMMA3_TEXT = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256},
    "gemma3_text": _GEMMA3_TEXT,
    "qwen3": {"head_dim": 128},
    "gpt2": {"n_positions": 1024, "vocab_size": 50257},
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "vision_use_head": True,
    },
}
"""Config classes' own values for keys that published config.json files leave out (transformers 5.24)."""

_READERS: dict[str, Callable[[Config], Shape]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2"), _llama_kind),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _llama_kind),
    **dict.fromkeys(sorted(_EXPERTS), _llama_kind),
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
}
