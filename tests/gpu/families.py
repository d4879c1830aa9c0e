"""Model families at their real shapes with random weights: made on the card from a config, nothing is downloaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..conftest import ROOT
from ..models import make_tiny_model

LLAMA = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 8B": (
        "llama",
        {
            **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
        },
    ),
    "llama 1B": (
        "llama",
        {
            **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        },
    ),
    "mistral 2B": (
        "mistral",
        {
            "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8,
            "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    ),
    "qwen2 1.5B": (
        "qwen2",
        {
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
    ),
    "gemma2 2B": (
        "gemma2",
        {
            "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        },
    ),
    "phi3 3.8B": (
        "phi3",
        {
            "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32,
        },
    ),
    "gpt_neox 1.4B": (
        "gpt_neox",
        {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
}  # fmt: skip
"""Families at 1 to 8B. Mistral has its own layers, but 8 of 32: the disk must hold all of them at once."""

SMALLER = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 16,
}  # fmt: skip
"""In place of a family's own numbers, for a rehearsal on a processor."""

HALF = "gpt_neox 1.4B"
"""The family for what needs a model and no particular one."""


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where models are made, and on what."""

    folder: Path
    device: str  # cuda, or cpu for the rehearsal
    small: bool = False
    seconds: list[float] = field(default_factory=list)  # what each model took to be made: mostly the disk's

    def model(self, family: str) -> Path:
        """A model of the family with its real shape, random weights in bf16 and the tests' tokenizer; made once."""
        folder, began = self.folder / family.replace(" ", "-"), time.monotonic()
        if (folder / "config.json").exists():
            return folder
        if self.device == "cpu":
            self.make(family, folder)
        else:  # a process of its own, whose context leaves the card with it
            command = [sys.executable, "-m", "tests.gpu.families", str(self.folder), family, str(folder)]
            subprocess.run(command, check=True, cwd=ROOT)
        self.seconds.append(time.monotonic() - began)
        return folder

    def make(self, family: str, folder: Path) -> None:
        """Make it on the device, and write it."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        kind, numbers = FAMILIES[family]
        heads = (
            {"num_key_value_heads": min(2, numbers["num_key_value_heads"])} if "num_key_value_heads" in numbers else {}
        )
        known = {name: value for name, value in SMALLER.items() if name != "head_dim" or name in numbers}
        shape = {**numbers, **(known | heads if self.small else {})}
        marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 8192}
        torch.manual_seed(0)
        with torch.device(self.device):
            config = AutoConfig.for_model(kind, **shape, **marks)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self._add_tokenizer(folder)
        model.save_pretrained(folder)

    def _add_tokenizer(self, folder: Path) -> None:
        """The tests' tokenizer: 400 words, which every family's vocabulary has room for."""
        source = self.folder / "tokenizer"
        if not source.exists():
            make_tiny_model(source)
        for path in source.iterdir():
            folder.mkdir(parents=True, exist_ok=True)
            if path.name not in ("config.json", "generation_config.json") and path.suffix != ".safetensors":
                shutil.copy(path, folder)


if __name__ == "__main__":
    made, family, folder = sys.argv[1:]
    Workshop(folder=Path(made), device="cuda").make(family, Path(folder))
