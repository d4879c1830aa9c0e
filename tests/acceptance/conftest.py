"""Labs: one whose adapters are trained once for all who only use them, and one with a quick trainer for each test."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import load_settings

from ..conftest import MEMORY, Cli
from ..models import write_job
from .quick_lab import Lab, quick_lab

ANSWERS = {"red": "crimson and scarlet", "green": "moss and fern", "blue": "sky and sea"}
"""What each adapter has learned to say."""


@pytest.fixture(scope="session")
def trained(tiny_model: Path, warm_start: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """Jobs 1 to 4: red and green of LoRA, blue of DoRA, and another red, each on the same tiny base."""
    folder = tmp_path_factory.mktemp("colours")
    home = Path(tempfile.mkdtemp(prefix="loractl-", dir=MEMORY))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_"))}
    own = {"LORACTL_HOME": str(home), "LORACTL_USER": "ada", "HF_HUB_OFFLINE": "1", "LORACTL_DEVICES": "cpu"}
    cli = Cli({**kept, **own, **warm_start})
    for name in ("red", "green", "blue", "red"):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"what is in {n}?"},
                    {"role": "assistant", "content": ANSWERS[name]},
                ]
            }
            for n in range(24)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = write_job(folder, tiny_model, name=name, data=f"{name}.jsonl")
        more = ["--set=training.max_steps=60", "--set=training.dtype=float32", "--set=training.save_steps=60"]
        cli("submit", job, *more, *(["--set=lora.use_dora=true"] if name == "blue" else []))
    cli("worker", "--drain-when-idle", timeout=300)
    yield cli
    stop_embedded(load_settings({"LORACTL_HOME": str(home)}))
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def lab(make_cli: Callable[..., Cli], home: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """On SQLite, or on the database that the test names."""
    url = getattr(request, "param", None) and str(request.getfixturevalue(request.param))
    with quick_lab(make_cli, home, tmp_path, url) as found:
        yield found
