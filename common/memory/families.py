"""Families of models: each one's shape, read from a config.json.

The counts are those of transformers 5, peft 0.21 and bitsandbytes 0.50, checked against the real classes on the meta
device in tests/integration/test_memory_trace.py. A config of another kind gives None: a guess would be worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .shape import Block, Experts, Linear, Shape

Config = Mapping[str, Any]


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
    known = replace(shape, needs_padding=shape.needs_padding or _needs_padding(config))
    return known if all(size > 0 for size in sizes) else None


ROW_ATTENTION = ("full_attention", "sliding_attention")
"""Layers that row attention knows; others use masks of their own, or carry a state from token to token."""


def _needs_padding(config: Config) -> bool:
    """Whether the engine refuses to train it unpadded, as far as a config shows: `_by_model` of its choice.py."""
    kinds, routed = config.get("layer_types"), config.get("output_router_logits")
    others = isinstance(kinds, list) and any(kind not in ROW_ATTENTION for kind in kinds)
    return bool(config.get("alibi")) or others or bool(routed)


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
    """The blocks with their MLPs; of a mixture of experts the sparse and the dense blocks (decoder_sparse_step)."""
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
    mixed = tuple(n for n in range(layers) if n not in only and (n + 1) % step == 0)
    plain = tuple(n for n in range(layers) if n not in mixed)
    blocks = [Block(count=len(mixed), linears=sparse, norms=norms, experts=experts, numbers=mixed)] if mixed else []
    return blocks + ([Block(count=len(plain), linears=dense, norms=norms, numbers=plain)] if plain else [])


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
        blocks=(Block(count=layers, linears=linears, norms=4 * hidden, path="transformer.h.{}"),),
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
        blocks=(Block(count=layers, linears=linears, norms=4 * hidden, path="gpt_neox.layers.{}"),),
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
    qkv = (heads + 2 * kv_heads) * head_dim
    block = _fused_block("self_attention", hidden, qkv, ffn, bias, mlp_bias=bias)
    linears = tuple(replace(layer, quantised=False) for layer in block)
    two = int(config.get("num_ln_in_parallel_attn") or 2) == 2 if new else not parallel
    return Shape(
        family="falcon",
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=int(config["vocab_size"]),
        tied=_tied(config),
        blocks=(Block(count=layers, linears=linears, norms=(4 if two else 2) * hidden, path="transformer.h.{}"),),
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
    count, layers = int(vision["num_hidden_layers"]), "model.vision_tower.encoder.layers.{}"
    tower = [Block(count=count, linears=(*attention, *mlp), norms=4 * hidden, text=False, path=layers)]
    ends = int(vision["num_channels"]) * patch**2 * hidden + hidden  # patch embedding
    ends += (int(vision["image_size"]) // patch) ** 2 * hidden + 2 * hidden  # positions, last norm
    ends += hidden * text.hidden + hidden  # projector and its norm
    if vision["vision_use_head"]:  # pooling by attention: a probe, fused q, k, v, and an MLP
        pooled = Linear(name="attention.out_proj", inputs=hidden, outputs=hidden, bias=True, quantised=False)
        head = "model.vision_tower.head"
        tower.append(Block(count=1, linears=(pooled, *mlp), norms=2 * hidden, text=False, path=head))
        ends += hidden + 3 * hidden * hidden + 3 * hidden
    return Shape(
        family="gemma3",
        hidden=text.hidden,
        heads=text.heads,
        kv_heads=text.kv_heads,
        head_dim=text.head_dim,
        vocab=text.vocab,
        tied=_tied(config),
        blocks=(*(replace(block, path="model.language_model.layers.{}") for block in text.blocks), *tower),
        outside=text.outside + ends,
        norms_per_block=text.norms_per_block,
        head_norms=True,
        needs_padding=text.needs_padding,
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


def _fused_block(path: str, hidden: int, qkv: int, ffn: int, bias: bool, *, mlp_bias: bool) -> tuple[Linear, ...]:
    """GPT-NeoX's and Falcon's four layers."""
    sizes = (
        (f"{path}.query_key_value", hidden, qkv, bias),
        (f"{path}.dense", hidden, hidden, bias),
        ("mlp.dense_h_to_4h", hidden, ffn, mlp_bias),
        ("mlp.dense_4h_to_h", ffn, hidden, mlp_bias),
    )
    return tuple(Linear(name=n, inputs=i, outputs=o, bias=b) for n, i, o, b in sizes)


_EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe"}

_TIED = {"gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "falcon", "smollm3"}
"""Families that tie head and embedding where config.json does not say: their config class does so."""

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
