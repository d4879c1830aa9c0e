"""The command that serves pulled adapters with vLLM."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from loractl.common.adapter_config import CONFIG, VLLM_RANKS
from loractl.common.errors import UsageError

WHOLE = "loractl adapters merge writes a whole model"


def vllm_command(folders: Mapping[str, Path], base_model: str, revision: str | None) -> str:
    """`vllm serve` for the adapters in these folders, by name. Raises UsageError for one that vLLM refuses."""
    rank, template = 1, None
    for name, folder in folders.items():
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        if config.get("task_type") not in ("CAUSAL_LM", None):
            raise UsageError(f"vLLM serves no classifier from an adapter: {name}", "loractl predict labels rows")
        what = next((key for key in ("use_dora", "modules_to_save", "lora_bias") if config.get(key)), None)
        if what is not None:
            raise UsageError(f"vLLM refuses adapters with {what}: {name}", WHOLE)
        rank = max(rank, config["r"], *(config.get("rank_pattern") or {}).values())
        if (folder / "chat_template.jinja").is_file():
            template = folder / "chat_template.jinja"
    if rank > VLLM_RANKS[-1]:
        raise UsageError(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, not {rank}", "loractl adapters merge writes a whole model"
        )
    words = ["vllm", "serve", base_model, *(["--revision", revision] if revision else [])]
    # With all slots full, requests to the bare base were answered with an adapter: vllm-project/vllm#48421.
    words += ["--enable-lora", "--max-loras", str(len(folders) + 1)]
    words += ["--max-lora-rank", str(next(one for one in VLLM_RANKS if one >= rank))]
    words += ["--chat-template", str(template.absolute())] if template else []
    words += ["--lora-modules", *(f"{name}={folder.absolute()}" for name, folder in folders.items())]
    return shlex.join(words)
