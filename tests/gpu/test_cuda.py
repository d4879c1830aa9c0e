"""What only a GPU can show. Skipped with a reason where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ..conftest import Cli
from ..models import write_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_job_trains_on_the_card_and_reports_its_memory(
    method: str, make_cli: Callable[..., Cli], tiny_model: Path, tmp_path: Path
) -> None:
    cli = make_cli(LORACTL_DEVICES="nvml")
    cli("submit", write_job(tmp_path, tiny_model, method=method))
    cli("worker", "--drain-when-idle", timeout=240)
    report = json.loads(cli("report", 1, "--json").stdout)
    assert report["training"]["device"] == "cuda"
    assert report["training"]["peak_memory_kind"] == "CUDA memory reserved"
    assert 0 < report["training"]["peak_memory_bytes"] < 2**30
    assert report["training"]["optim"] == ("paged_adamw_8bit" if method == "qlora" else "adamw_torch_fused")
