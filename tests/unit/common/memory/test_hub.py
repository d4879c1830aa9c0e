"""Where the hub's library keeps models, and whether it may ask: told without the library, as the library has it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from loractl.common.memory.config import hub_cache, hub_is_off

NAMES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
ASK = "from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE; print(HF_HUB_CACHE, HF_HUB_OFFLINE)"


@pytest.mark.parametrize(
    "given",
    [
        {"HF_HOME": "~/$LAB/hf", "LAB": "lab", "TRANSFORMERS_OFFLINE": "yes"},
        {"XDG_CACHE_HOME": "/x", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
        {"HF_HOME": "/x", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_OFFLINE": "True"},
    ],
)
def test_it_is_where_the_library_has_it(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    told = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=os.environ, check=True)
    assert told.stdout.split() == [str(hub_cache()), str(hub_is_off())]
