"""peft's adapter_config.json is let through key by key: no expression, no code, nothing without bounds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from loractl.common.adapter_config import CONFIG, allowed, check_adapter_config
from loractl.common.errors import ArtifactError, ExitCode

WRITTEN: dict[str, Any] = {
    "alpha_pattern": {}, "base_model_name_or_path": "/srv/models/tiny", "bias": "none", "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "layers_pattern": None, "layers_to_transform": None,
    "lora_alpha": 8.0, "lora_bias": False, "lora_dropout": 0.05, "modules_to_save": ["embed_tokens", "lm_head"],
    "peft_type": "LORA", "peft_version": "0.21.2", "r": 4, "rank_pattern": {".*\\.gate_up_proj": 8}, "revision": None,
    "target_modules": ["model.layers.0.mlp.down_proj", "q_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
    "use_dora": True, "use_rslora": False,
}  # fmt: skip
"""As save_adapter leaves it; the rank by pattern is what peft writes for joined experts."""

HOSTILE: list[tuple[str, Any]] = [
    ("target_modules", r"(\w+\.?)*!"),
    ("target_modules", "all-linear"),
    ("target_modules", [r"(a|a)*$"]),
    ("target_modules", ["q_proj\n"]),
    ("target_modules", ["a" * 257]),
    ("target_modules", ["q_proj"] * 20_001),
    ("exclude_modules", "(a*)*b"),
    ("modules_to_save", ["(a|aa)+x"]),
    ("layers_pattern", "(.*)*"),
    ("layers_pattern", ["(.*)*"]),
    ("layers_to_transform", [-1]),
    ("rank_pattern", {"(.*.*)*x": 4}),
    ("rank_pattern", {"q_proj": 2**30}),
    ("rank_pattern", {f"m{n}": 4 for n in range(65)}),
    ("alpha_pattern", {"q_proj": float("inf")}),
    ("alpha_pattern", "(.*)*"),
    ("r", 2**40),
    ("r", True),
    ("r", 4.5),
    ("lora_alpha", float("nan")),
    ("lora_alpha", 10**400),
    ("lora_dropout", 2),
    ("bias", ["none"]),
    ("peft_type", "POLY"),
    ("task_type", "FEATURE_EXTRACTION"),
    ("use_dora", "yes"),
    ("revision", "x" * 256),
    ("base_model_name_or_path", "\x1b[2J"),
    ("auto_mapping", {"base_model_class": "Model", "parent_library": "os"}),
    ("megatron_core", "os"),
    ("a\x1b[2J", 1),
]


def test_what_loractl_writes_is_read(tmp_path: Path) -> None:
    check_adapter_config(json.dumps(WRITTEN).encode())
    (tmp_path / CONFIG).write_text(json.dumps(WRITTEN))
    check_adapter_config(tmp_path / CONFIG)
    assert allowed({**WRITTEN, "auto_mapping": {"parent_library": "os"}}) == WRITTEN


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=lambda part: str(part)[:24])
def test_a_hostile_value_is_refused_in_milliseconds(key: str, value: object) -> None:
    raw = json.dumps({**WRITTEN, key: value}).encode()
    began = time.process_time()
    with pytest.raises(ArtifactError, match=r"the adapter's adapter_config\.json is refused") as refused:
        check_adapter_config(raw)
    assert time.process_time() - began < 0.2
    assert (key if key.isprintable() else r"\x1b") in refused.value.sentence and refused.value.sentence.isprintable()
    assert refused.value.exit_code is ExitCode.FAILED


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}", b" " * (4 * 2**20 + 1)]
)
def test_what_is_no_configuration_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(raw)
    for content in (raw, tmp_path / CONFIG):
        with pytest.raises(ArtifactError, match="is refused"):
            check_adapter_config(content)
    with pytest.raises(ArtifactError, match="can't be read as JSON"):
        check_adapter_config(tmp_path / "none")
