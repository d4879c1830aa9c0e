"""Views of a base: modules of their own, weights in common."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loractl.worker.engine.passes.shared import view_of

SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def test_what_changes_in_one_view_changes_in_no_other() -> None:
    from peft import LoraConfig, get_peft_model

    base = LlamaForCausalLM(LlamaConfig(**SMALL)).train()
    names = [name for name, _ in base.named_modules()]
    tensors = {name: tensor.data_ptr() for name, tensor in base.state_dict().items()}
    first, second = view_of(base), view_of(base)
    adapted = get_peft_model(first, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    first.config._attn_implementation = "eager"
    assert [name for name, _ in base.named_modules()] == [name for name, _ in second.named_modules()] == names
    assert base.training and second.training and not adapted.training
    assert base.config._attn_implementation == second.config._attn_implementation == "sdpa"
    for view in (base, second):
        assert {name: tensor.data_ptr() for name, tensor in view.state_dict().items()} == tensors
    assert second.lm_head.weight is second.model.embed_tokens.weight is base.lm_head.weight
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(base(ids).logits, second(ids).logits) and not torch.equal(base(ids).logits, adapted(ids).logits)
