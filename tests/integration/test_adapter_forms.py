"""A pulled adapter in the forms of other servers, compared with what these servers' own libraries read."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from loractl.common.adapter_config import CONFIG
from loractl.common.errors import UsageError
from loractl.scheduler.adapters.runtimes import vllm_command, write_gguf


def make_adapter(folder: Path, kind: str, **lora: Any) -> Path:
    """A base with two heads of keys to four of queries, its adapter with weights other than zero; returns the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(str(folder / "base"))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(base, LoraConfig(**settings))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_" in name:
                weights.normal_()
    model.save_pretrained(str(folder / "adapter"))
    return folder / "base"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_gguf_has_the_adapter_s_weights_in_the_order_of_llama_cpp_s_base(kind: str, tmp_path: Path) -> None:
    """transformers reads llama.cpp's bases, so it knows the order of their rows."""
    import numpy as np
    from gguf import GGUFReader
    from safetensors.numpy import load_file
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    base = make_adapter(tmp_path, kind)
    reader = GGUFReader(write_gguf(tmp_path / "adapter", str(base), None))
    told = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert told == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    architecture = reader.fields["general.architecture"].contents()
    config = json.loads((base / "config.json").read_text())
    processor = TENSOR_PROCESSORS[architecture](config=config) if architecture in TENSOR_PROCESSORS else None
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}  # fmt: skip
    assert len(written) == len(stored) == 2 * 2 * len(names)
    for layer in range(2):
        for ours, theirs in names.items():
            first = f"base_model.model.model.layers.{layer}.{ours}.lora_"
            a, b = stored[f"{first}A.weight"], stored[f"{first}B.weight"]
            read = written[f"blk.{layer}.{theirs}.weight.lora_b"]
            if processor is not None and architecture == "llama":
                read = processor.process(weights=read, name=f"blk.{layer}.{theirs}.weight").weights
            assert np.array_equal(read, b), (kind, layer, ours)
            assert np.array_equal(written[f"blk.{layer}.{theirs}.weight.lora_a"], a)


def test_a_scale_by_the_root_of_the_rank_is_written_as_the_alpha_that_gives_it(tmp_path: Path) -> None:
    from gguf import GGUFReader

    base = make_adapter(tmp_path, "llama", use_rslora=True)
    reader = GGUFReader(write_gguf(tmp_path / "adapter", str(base), None))
    assert reader.fields["adapter.lora.alpha"].contents() / 4 == 8 / 4**0.5


@pytest.mark.parametrize(
    ("kind", "lora", "what"),
    [
        ("llama", {"use_dora": True}, "use_dora: true"),
        ("llama", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("llama", {"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ("gpt_neox", {}, "--gguf knows llama, mistral, qwen2, qwen3, not gpt_neox"),
    ],
)
def test_what_the_gguf_can_t_hold_is_refused_and_nothing_is_written(
    kind: str, lora: dict[str, Any], what: str, tmp_path: Path
) -> None:
    base = make_adapter(tmp_path, kind, **lora)
    with pytest.raises(UsageError, match=what):
        write_gguf(tmp_path / "adapter", str(base), None)
    assert not list(tmp_path.rglob("*.gguf"))


def adapter(folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"r": 8, "task_type": "CAUSAL_LM", **settings}))
    return folder


def test_vllm_gets_a_rank_that_it_takes_and_a_slot_more_than_adapters(tmp_path: Path) -> None:
    small, large = adapter(tmp_path / "small"), adapter(tmp_path / "large", r=20, rank_pattern={"q_proj": 40})
    (small / "chat_template.jinja").touch()
    words = shlex.split(vllm_command({"a-1": small, "b-2": large}, "org/base", "main"))
    assert words[:5] == ["vllm", "serve", "org/base", "--revision", "main"]
    options = dict(itertools.pairwise(words))
    assert (options["--max-loras"], options["--max-lora-rank"]) == ("3", "64")
    assert options["--chat-template"] == str(small / "chat_template.jinja")
    assert words[-2:] == [f"a-1={small}", f"b-2={large}"]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 1024}, "up to 512"),
        ({"task_type": "SEQ_CLS"}, "no classifier"),
    ],
)
def test_what_vllm_refuses_is_said_here(settings: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=what):
        vllm_command({"a": adapter(tmp_path / "a", **settings)}, "org/base", None)
