"""The rooms' rules that import-linter does not know: a module's first line, a room's door, names that exist once."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections import defaultdict
from pathlib import Path

from loractl.common.queue.hints import WAKE_TASK

ROOT = Path(__file__).parents[2]
FLOORS = ("common", "scheduler", "worker")
MODULES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
NO_MODULES = {WAKE_TASK, "loractl.db", "loractl.conf"}
"""A task's name and files'."""

NAMES_A_MODULE = re.compile(r"loractl(\.[a-z_0-9]+)+(:[A-Za-z_]+)?")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text("utf-8"))


def test_a_module_says_what_it_is_about() -> None:
    assert [str(path) for path in MODULES if not ast.get_docstring(tree(path))] == []


def test_a_room_s_door_says_its_rule_and_imports_nothing() -> None:
    """Importing one module of a room must not load the others."""
    doors = [path for path in MODULES if path.name == "__init__.py"]
    bodies = {path: tree(path).body for path in doors}
    assert doors
    assert [str(path) for path, body in bodies.items() if len(body) != 1 or not isinstance(body[0], ast.Expr)] == []


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
