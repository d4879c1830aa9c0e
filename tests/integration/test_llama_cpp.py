"""llama.cpp itself, from xllamacpp's wheel, on a base and the LoRA GGUF that loractl writes: peft's logits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loractl.scheduler.adapters import runtimes
from loractl.scheduler.adapters.runtimes import ARCHITECTURES, write_gguf

from .test_adapter_forms import make_adapter

xllamacpp = pytest.importorskip("xllamacpp", reason="it is in the extra: pip install -e .[llama-cpp]")

_DRAW = random.Random(0)
PROMPTS = [[_DRAW.randrange(64) for _ in range(length)] for length in (1, 2, 5, 9, 17, 40, 80, 120)]


def write_base(base: Path, file: Path) -> None:
    """The base as llama.cpp's converter writes it, in fp32; its tokens are single signs."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((base / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_value_length(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("!") + place) for place in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["! !"])
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, layers)
    rows = {"q_proj": heads, "k_proj": config["num_key_value_heads"]} if architecture == "llama" else {}
    for name, weights in load_file(base / "model.safetensors").items():
        of = rows.get(name.split(".")[-2])
        half = weights.shape[0] // of // 2 if of else 0
        ordered = weights.reshape(of, 2, half, -1).swapaxes(1, 2).reshape(weights.shape) if of else weights
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(ordered))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_llama_cpp(base: Path, adapter: Path | None) -> Any:
    """For each prompt the logarithm of each token's probability: (8, 64)."""
    asked = xllamacpp.CommonParams()
    asked.model.path = str(base)
    asked.n_ctx, asked.n_parallel, asked.warmup = 128, 1, False
    asked.cpuparams.n_threads = 1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(asked)
    found = np.full((len(PROMPTS), 64), np.nan)
    for row, prompt in zip(found, PROMPTS, strict=True):
        answer = server.handle_completions({"prompt": prompt, "n_predict": 1, "n_probs": 64, "cache_prompt": False})
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    return found


def of_peft(base: Path, adapter: Path | None) -> Any:
    """The same."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return torch.log_softmax(torch.stack(logits), -1).numpy()


@pytest.mark.long  # test_adapter_forms compares the files
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_llama_cpp_computes_what_peft_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, file = make_adapter(tmp_path, kind), tmp_path / "adapter", tmp_path / "base.gguf"
    write_base(base, file)
    bare, tuned = of_peft(base, None), of_peft(base, adapter)
    assert abs(of_llama_cpp(file, None) - bare).max() < 5e-3
    assert abs(of_llama_cpp(file, write_gguf(adapter, str(base), None)) - tuned).max() < 5e-3
    assert abs(tuned - bare).max() > 0.1, "the adapter changes something"
    if ARCHITECTURES[kind] == "llama":
        monkeypatch.setattr(runtimes, "_in_its_order", lambda weights, heads: weights)
        assert abs(of_llama_cpp(file, write_gguf(adapter, str(base), None)) - tuned).max() > 0.1
