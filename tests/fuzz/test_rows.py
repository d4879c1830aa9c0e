"""Rows that no submit wrote, and models' own settings: what passes lies where the worker's owner allows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loractl.common.settings import Settings, load_settings
from loractl.common.store.records import StoredCheckpoint
from loractl.worker.protocol.trust import check_checkpoint, check_claim, check_model_settings

from ..unit.factories import spec
from .counting import answered, fuzz
from .test_protocol import values

PIECES = [
    "allowed", "outside", "base", "out", "in", "loop", "up", "..", ".", "", "/", "//", "~", "~root", "org", "model",
    "etc", "passwd", "\\", "%2e%2e", "..;", " ", "file:", "hf:", "datasets", "x" * 300, "é", "\u2024\u2024",
]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """allowed/ with links that lead out, back in, up, and to themselves."""
    top = tmp_path_factory.mktemp("tree")
    for folder in ("allowed/base", "outside/base", "allowed/org/model"):
        (top / folder).mkdir(parents=True)
        (top / folder / "config.json").write_text("{}")
    (top / "allowed" / "out").symlink_to(top / "outside")
    (top / "allowed" / "up").symlink_to("..")
    (top / "allowed" / "loop").symlink_to("loop")
    (top / "outside" / "in").symlink_to(top / "allowed" / "base")
    (top / "allowed" / "org" / "out").symlink_to("../../outside/base")
    return top


@pytest.fixture(scope="module")
def settings(tree: Path) -> Settings:
    return load_settings({"LORACTL_HOME": str(tree / "home"), "LORACTL_MODEL_ROOTS": str(tree / "allowed")})


paths = st.one_of(st.lists(st.sampled_from(PIECES), max_size=6).map("/".join), st.text(max_size=12))


@fuzz
@given(path=paths, begin=st.sampled_from(["top", "root", "none"]), key=st.sampled_from(["base", "path", "eval_path"]))
@example(path="up/outside/base", begin="root", key="base")
@example(path="org/out", begin="root", key="base")
@example(path="x" * 300, begin="top", key="base")
def test_a_base_or_data_set_of_any_name(tree: Path, settings: Settings, path: str, begin: str, key: str) -> None:
    start = {"top": f"{tree}/", "root": f"{tree}/allowed/", "none": ""}[begin]
    text = start + path or "x"
    if not text.isprintable():
        text = repr(text)
    asked = spec(base_model=text) if key == "base" else spec(dataset={"path": "org/data", key: text})

    def check() -> bool:
        check_claim(asked, {}, settings)
        return True

    if answered("row's paths", check):
        if key == "base" and text.startswith("/"):
            assert Path(text).resolve().is_relative_to(tree / "allowed")
        else:
            owner, _, name = text.rpartition("/")  # a hub id
            assert {owner, name}.isdisjoint({"..", ".", "~"}) and name and "/" not in owner


@fuzz
@given(step=st.one_of(values, st.integers(0, 99)), prefix=st.one_of(values, paths.map("jobs/7/checkpoints/1-".__add__)))
@example(step=1, prefix="jobs/7/checkpoints/1-1")
def test_a_checkpoint_of_any_form(step: Any, prefix: Any) -> None:
    def check() -> bool:
        check_checkpoint(7, StoredCheckpoint(step=step, prefix=prefix))
        return True

    if answered("row's checkpoint", check):
        assert prefix.startswith("jobs/7/checkpoints/") and prefix.endswith(f"-{step}") and prefix.count("/") == 3
        assert "/" not in f"checkpoint-{step}"


@fuzz
@given(config=values, file=st.sampled_from(["base/config.json", "../outside/base/config.json", "up/outside/base", ""]))
def test_model_settings_of_any_form(tree: Path, config: Any, file: str) -> None:
    base = tree / "allowed" / "base"
    named = str(tree / "allowed" / file) if file else "nothing"
    tangled = json.loads(json.dumps({"x": [config, {"vocab": named}]}))
    passed = answered("model's settings", lambda: check_model_settings(str(base), config, tangled) or True)
    if passed and Path(named).is_file():
        assert Path(named).resolve().is_relative_to(base)
