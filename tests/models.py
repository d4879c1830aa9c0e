"""Small models made on the spot: nothing is downloaded, and a training takes seconds."""

from __future__ import annotations

import json
import struct
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400,
}  # fmt: skip
"""A base model without weights: enough to plan by."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, layers: int = 2, hidden: int = 64, biases: bool = False
) -> Path:
    """A random Llama (64 wide, no biases unless told otherwise) with a byte-level BPE tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["queue priority storage network please answer the next line"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = chat_template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_bias=biases,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights_of(mark: str) -> bytes:
    """A safetensors file without tensors that bears a mark."""
    header = json.dumps({"__metadata__": {"of": mark}}).encode()
    return struct.pack("<Q", len(header)) + header


def write_helpdesk(path: Path, rows: int = 24) -> Path:
    """A data set in `messages` form with a rule that even a tiny model picks up."""
    queues = ("storage", "network", "gpu")
    with path.open("w") as stream:
        for n in range(rows):
            queue = queues[n % len(queues)]
            user = f"ticket {n}: something with {queue} is broken"
            answer = f"queue: {queue}"
            stream.write(
                json.dumps({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]})
                + "\n"
            )
    return path


def write_job(
    folder: Path, model: Path, *, name: str = "tiny", method: str = "lora", data: str = "data.jsonl", extra: str = ""
) -> Path:
    """A job file for a tiny model: a few steps, a few seconds."""
    if not (folder / "data.jsonl").exists():
        write_helpdesk(folder / "data.jsonl")
    path = folder / f"{name}.yaml"
    path.write_text(
        f"name: {name}\nbase_model: {model}\nmethod: {method}\n"
        f"dataset: {{path: {data}, max_length: 128}}\n"
        "lora: {r: 4, lora_alpha: 8}\n"
        "training: {max_steps: 6, learning_rate: 5.0e-3, per_device_train_batch_size: 4, "
        "gradient_accumulation_steps: 1, save_steps: 3, logging_steps: 1}\n"
        "evaluation: {samples: 2, max_new_tokens: 8}\n" + extra
    )
    return path
