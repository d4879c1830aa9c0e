"""A pulled adapter for other programs: a LoRA GGUF, which llama.cpp and ollama load on their GGUF of the base, and the
command that serves it with vLLM.

The format of the GGUF is that of llama.cpp's convert_lora_to_gguf.py: https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import json
import math
import re
import shlex
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loractl.common.adapter_config import CONFIG, VLLM_RANKS
from loractl.common.artifacts import WEIGHTS
from loractl.common.errors import UsageError
from loractl.common.memory.config import find_config

if TYPE_CHECKING:
    from numpy import ndarray

FILE = "adapter.gguf"

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture, by transformers' model_type."""

_PLAIN: dict[str, tuple[Any, Any]] = {
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": (None, []),
    "fan_in_fan_out": (False, None),
    "task_type": ("CAUSAL_LM", None),
}
"""What a LoRA GGUF can't say otherwise."""

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def write_gguf(folder: Path, base_model: str, revision: str | None) -> Path:
    """Write adapter.gguf next to a pulled adapter's files: fp32, the rows of q and k in llama.cpp's order.

    Raises UsageError for an adapter that the format can't hold, and where the base's config.json or a library lacks.
    """
    adapter: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
    path = find_config(base_model, revision)
    if path is None:
        what = f"--gguf needs config.json of {base_model}, which is not on this machine"
        raise UsageError(what, "copy it here first")
    base: dict[str, Any] = json.loads(path.read_text("utf-8"))
    architecture = ARCHITECTURES.get(str(base.get("model_type")))
    if architecture is None:
        names = ", ".join(ARCHITECTURES)
        raise UsageError(f"--gguf knows {names}, not {base.get('model_type')}", "loractl adapters merge --gguf")
    for key, plain in _PLAIN.items():
        if adapter.get(key) not in plain:
            what = f"a LoRA GGUF can't hold {key}: {json.dumps(adapter[key])}"
            raise UsageError(what, "loractl adapters merge --gguf writes the whole model")
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UsageError("--gguf needs the package gguf, which is not installed", "pip install gguf") from error
    heads = int(base["num_attention_heads"])
    rows = {"q_proj": heads, "k_proj": int(base.get("num_key_value_heads") or heads)}
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    tensors = gguf.get_tensor_name_map(number, int(base["num_hidden_layers"]))
    writer = gguf.GGUFWriter(folder / FILE, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp divides by the rank, rsLoRA by its root
    root = math.sqrt(adapter["r"]) if adapter.get("use_rslora") else 1.0
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter["lora_alpha"]) * root)
    for name, stored in _tensors(folder / WEIGHTS.removeprefix("adapter/")).items():
        found = _TENSOR.fullmatch(name)
        module = found[1] if found else name
        known: str | None = tensors.get_name(module) if found else None
        if known is None or (known == "output" and base.get("tie_word_embeddings")):
            raise UsageError(f"a LoRA GGUF can't hold {module}", "loractl adapters merge --gguf writes the whole model")
        assert found
        own = module.rpartition(".")[2]
        reorders = architecture == "llama" and found[2] == "B" and own in rows
        weights = _in_its_order(stored, rows[own]) if reorders else stored
        writer.add_tensor(f"{known}.weight.lora_{found[2].lower()}", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / FILE


def _tensors(file: Path) -> dict[str, ndarray[Any, Any]]:
    """The file's tensors in fp32."""
    import numpy as np

    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header, body = json.loads(opened.read(length)), opened.read()
    found = {}
    for name, told in sorted(header.items()):
        if name == "__metadata__":
            continue
        first, last = told["data_offsets"]
        kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[told["dtype"]]
        flat = np.frombuffer(body[first:last], dtype=kind)
        if told["dtype"] == "BF16":  # the upper half of an fp32
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        found[name] = flat.astype(np.float32).reshape(told["shape"])
    return found


def _in_its_order(weights: ndarray[Any, Any], heads: int) -> ndarray[Any, Any]:
    """Rows of q or k as llama.cpp's GGUF of a Llama has them: the two halves that rotate together are interleaved."""
    half = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weights.shape)


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
        raise UsageError(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, not {rank}", WHOLE)
    words = ["vllm", "serve", base_model, *(["--revision", revision] if revision else [])]
    # With all slots full, requests to the bare base were answered with an adapter: vllm-project/vllm#48421.
    words += ["--enable-lora", "--max-loras", str(len(folders) + 1)]
    words += ["--max-lora-rank", str(next(one for one in VLLM_RANKS if one >= rank))]
    words += ["--chat-template", str(template.absolute())] if template else []
    words += ["--lora-modules", *(f"{name}={folder.absolute()}" for name, folder in folders.items())]
    return shlex.join(words)
