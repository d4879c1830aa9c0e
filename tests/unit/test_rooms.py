"""The rooms' rules that import-linter does not know: a module's length, a room's door, names that exist once."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import defaultdict
from pathlib import Path

import pytest

from loractl.common.queue.hints import WAKE_TASK

ROOT = Path(__file__).parents[2]
FLOORS = ("common", "scheduler", "worker")
MODULES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
MOST_LINES = 400
MOST_MODULES = 15
ONE_A_COMMAND = Path("scheduler/commands")
NO_MODULES = {WAKE_TASK, "loractl.db", "loractl.conf"}
"""A task's name and files'."""

NAMES_A_MODULE = re.compile(r"loractl(\.[a-z_0-9]+)+(:[A-Za-z_]+)?")


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text("utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_says_what_it_is_about_and_is_not_long(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "its first line says what it is about"
    lines = len((ROOT / path).read_text("utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: it is two modules"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=str)
def test_a_room_s_door_says_its_rule_and_imports_nothing(path: Path) -> None:
    """Importing one module of a room must not load the others."""
    docstring, *rest = tree(path).body
    assert isinstance(docstring, ast.Expr) and not rest
    modules = [p for p in MODULES if p.parent == path.parent and p != path]
    assert len(modules) <= MOST_MODULES or path.parent == ONE_A_COMMAND, f"{len(modules)} modules: it is two rooms"


def test_a_class_name_exists_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_a_text_that_names_a_module_names_one_that_is_there() -> None:
    """Commands load by name, and nodes and trainers start by name: import-linter sees none of these."""
    texts = {
        node.value
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMES_A_MODULE.fullmatch(node.value)
    }
    modules = sorted({text.partition(":")[0] for text in texts if text not in NO_MODULES})
    assert len(modules) > 20, "the commands at the least"
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
