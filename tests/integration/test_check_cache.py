"""Checks that passed on a box: a new process does not repeat them, and any change is checked again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loractl.common.job.status import Reason
from loractl.worker.base import lora, model
from loractl.worker.engine.passes import attention, check_cache, choice, fused, lean
from loractl.worker.engine.passes.check_cache import CheckCache

from .conftest import Recipe

WEIGHTS = Path("result") / "adapter" / "adapter_model.safetensors"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty one for each test, which are about what it keeps."""
    return tmp_path / "cache"


@pytest.fixture
def tiny_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy: these tests change its files, and the whole run shares the first."""
    return shutil.copytree(tiny_model, tmp_path / "base" / "tiny")


def with_one_bit_more(file: Path) -> None:
    """Other weights, of the same size and date, where the old ones were."""
    content, dates = file.read_bytes(), file.stat()
    file.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))


@pytest.mark.long
def test_a_new_process_tries_no_rows_that_the_box_knows_to_be_right(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    own, times = choice.rows_together, list[int]()
    monkeypatch.setattr(choice, "rows_together", lambda *a, **k: (times.append(1), own(*a, **k))[1])

    def tries(where: str, **options: Any) -> int:
        before = len(times)
        assert recipe(where, max_steps=1, **options)[0].reason is Reason.OK
        return len(times) - before

    assert [tries("first"), tries("again")] == [1, 0]
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    assert tries("other layers", lora={"target_modules": ["q_proj"]}) == 1
    assert tries("other method", method="qlora") == 1
    with monkeypatch.context() as patch:
        patch.setattr(check_cache.transformers, "__version__", "99")
        assert tries("other code") == 1
    with_one_bit_more(tiny_model / "model.safetensors")
    assert tries("other files") == 1


@pytest.mark.parametrize("module", [attention, choice, fused, lean, lora, model])
def test_a_check_follows_from_the_code_that_it_checks(module: ModuleType) -> None:
    """Wherever that code is moved: an answer of other code would be believed."""
    assert Path(module.__file__ or "").parent in check_cache.ROOMS


def test_what_was_wrong_is_tried_again_and_few_answers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_cache, "KEPT", 4)

    def asked(question: str, wrong: str | None) -> bool:
        """Whether it was tried."""
        done = list[int]()

        def check() -> str | None:
            done.append(1)
            return wrong

        said = CheckCache(folder=tmp_path, about=["x"])(question, check)
        assert said == (wrong if done else None)
        return bool(done)

    assert asked("a", "it is wrong") and asked("a", "it is wrong") and asked("a", None) and not asked("a", "wrong")
    assert asked("b", None) and not asked("b", None)
    for n in range(5):
        for place, file in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)):
            os.utime(file, (place, place))  # as if some time had passed
        asked(f"more {n}", None)
        assert not asked("b", None), "what is asked for stays"
    assert len(list(tmp_path.iterdir())) == 4
