"""Shapes from config.json: published parameter counts, and None for what is not known or can't be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loractl.common.memory.config import find_config, read_shape
from loractl.common.memory.families import shape_of
from loractl.common.memory.shape import Shape
from loractl.common.memory.step import is_lean

from ...factories import spec

LLAMA = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def config(kind: str, *sizes: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **dict(zip(LLAMA, sizes, strict=True)), "vocab_size": vocab, **more}


SMOLLM2_135M = config("llama", 576, 30, 9, 3, 1536, vocab=49152, tie_word_embeddings=True)
GEMMA3_VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14}
GEMMA3_VISION |= {"image_size": 896, "vision_use_head": False}

MIXTRAL = config("mixtral", 4096, 32, 32, 8, 14336, vocab=32000, num_local_experts=8, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("of", "padded"),
    [
        (SMOLLM2_135M, False),
        ({**SMOLLM2_135M, "layer_types": ["full_attention", "sliding_attention"] * 15}, False),
        ({**SMOLLM2_135M, "layer_types": ["full_attention", "chunked_attention"] * 15}, True),
        (MIXTRAL, False),
        ({**MIXTRAL, "output_router_logits": True}, True),
    ],
)
def test_a_model_whose_rows_need_padding_is_known_by_its_config(of: dict[str, Any], padded: bool) -> None:
    """So that submit plans what the engine will do."""
    shape = shape_of(of)
    assert shape is not None and shape.needs_padding is padded
    assert is_lean(shape, spec()) is not padded


PUBLISHED = [
    (SMOLLM2_135M, 134_515_008),
    (config("llama", 4096, 32, 32, 8, 14336, vocab=128256), 8_030_261_248),  # Llama 3.1 8B
    (config("mistral", 4096, 32, 32, 8, 14336, vocab=32000), 7_241_732_096),  # Mistral 7B v0.1
    (config("qwen2", 1536, 28, 12, 2, 8960, vocab=151936, tie_word_embeddings=True), 1_543_714_304),  # Qwen2.5 1.5B
    (config("qwen3", 1024, 28, 16, 8, 3072, vocab=151936, tie_word_embeddings=True), 596_049_920),  # Qwen3 0.6B
    (config("gemma2", 2304, 26, 8, 4, 9216, vocab=256000), 2_614_341_888),  # Gemma 2 2B
    (config("phi3", 3072, 32, 32, 32, 8192, vocab=32064), 3_821_079_552),  # Phi-3 mini
    ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}, 124_439_808),  # GPT-2
    (
        {  # Pythia 1.4B
            "model_type": "gpt_neox",
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 8192,
            "vocab_size": 50304,
        },
        1_414_647_808,
    ),
    (
        config("mixtral", 4096, 32, 32, 8, 14336, vocab=32000, num_local_experts=8, num_experts_per_tok=2),
        46_702_792_704,
    ),
    (
        {  # Gemma 3 4B, whose text_config leaves out what is the class's default
            "model_type": "gemma3",
            "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
            "vision_config": GEMMA3_VISION,
        },
        4_300_079_472,
    ),
]


def shape(changed: dict[str, Any]) -> Shape:
    found = shape_of(changed)
    assert found is not None
    return found


@pytest.mark.parametrize(("sizes", "parameters"), PUBLISHED, ids=[c["model_type"] for c, _ in PUBLISHED])
def test_the_parameters_of_published_models_are_counted_exactly(sizes: dict[str, Any], parameters: int) -> None:
    assert shape(sizes).parameters == parameters


def test_an_output_head_of_its_own_and_a_wider_head_are_counted() -> None:
    tied = shape(SMOLLM2_135M)
    untied = shape({**SMOLLM2_135M, "tie_word_embeddings": False})
    assert untied.other_parameters - tied.other_parameters == 49152 * 576
    wide = shape({**SMOLLM2_135M, "head_dim": 128})
    assert wide.linear_parameters - tied.linear_parameters == 30 * 2 * (576 * 576 + 576 * 192)
    assert shape({k: v for k, v in SMOLLM2_135M.items() if k != "num_key_value_heads"}).kv_heads == 9


def test_an_adapter_has_r_times_in_plus_out_for_each_layer_that_is_named() -> None:
    found = shape(SMOLLM2_135M)
    whole = 30 * 8 * ((576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3)
    assert found.adapter_parameters(8, "all-linear") == whole
    assert found.adapter_parameters(8, ["q_proj", "v_proj"]) == 30 * 8 * (576 + 576 + 576 + 192)
    assert found.adapter_parameters(8, ["self_attn.q_proj"]) == 30 * 8 * (576 + 576)
    assert found.adapter_parameters(8, ["proj"]) == 0, "a part of a name is no name"


def test_fused_experts_are_adapted_but_not_quantised() -> None:
    sparse = shape(config("mixtral", 64, 2, 4, 2, 96, vocab=512, num_local_experts=4, num_experts_per_tok=2))
    assert sparse.linear_parameters == 2 * (64 * 64 * 2 + 64 * 32 * 2), "attention alone"
    assert sparse.adapter_parameters(4, "all-linear") == 25_632
    assert sparse.adapter_parameters(4, ["q_proj"]) == 2 * 4 * 128


def test_falcons_layers_are_not_quantised() -> None:
    falcon = shape(
        {
            "model_type": "falcon",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 512,
        }
    )
    assert falcon.linear_parameters == 0
    assert falcon.parameters == 119_168
    assert falcon.adapter_parameters(4, "all-linear") == 7_424


def test_layers_without_experts_are_dense() -> None:
    sizes = config("qwen3_moe", 64, 4, 4, 2, 96, vocab=512, num_experts=4, num_experts_per_tok=2)
    sizes |= {"moe_intermediate_size": 32, "head_dim": 32}
    assert [b.count for b in shape({**sizes, "mlp_only_layers": [0]}).blocks] == [3, 1]
    assert [b.count for b in shape({**sizes, "decoder_sparse_step": 2}).blocks] == [2, 2]


def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert read_shape("org/model") is None
    folder = tmp_path / "hub" / "models--org--model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SMOLLM2_135M))
    found = read_shape("org/model")
    assert found is not None
    assert found.parameters == 134_515_008
    assert find_config(tmp_path) is None, "a folder without a config is no hub id"


def test_the_cache_is_read_at_the_job_s_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--model"
    for commit in ("abc", "def"):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs" / "heads").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc\n")
    (repository / "refs" / "heads" / "next").write_text("def")

    def commit_of(revision: str | None) -> str | None:
        found = find_config("org/model", revision)
        return found.parent.name if found else None

    assert [commit_of(one) for one in (None, "main", "heads/next", "def")] == ["abc", "abc", "def", "def"]
    assert commit_of("v2") is None, "what the cache has is of another revision"
    assert commit_of("heads/../main") is None


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "mamba"},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"vocab_size": -1},
        {"num_hidden_layers": "many"},
    ],
)
def test_a_config_of_an_unknown_kind_gives_no_shape(changed: dict[str, Any]) -> None:
    assert shape_of({**SMOLLM2_135M, **changed}) is None


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_damaged_config_gives_no_shape(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert read_shape(tmp_path) is None
