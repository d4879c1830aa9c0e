"""The rooms' rules that import-linter does not know: a module's first line, a room's door, names that exist once."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from loractl.common.queue.hints import WAKE_TASK

ROOT = Path(__file__).parents[2]
FLOORS = ("common", "scheduler", "worker")
MODULES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
NO_MODULES = {WAKE_TASK, "loractl.db", "loractl.conf"}
"""A task's name and files'."""

OURS = ("tests", "benchmarks")

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


def test_a_function_of_a_module_is_used_by_more_than_tests() -> None:
    """What a decorator registers is called by a library: a command, a route, an event."""
    templates = [path for floor in FLOORS for path in (ROOT / floor).rglob("*") if path.suffix in (".jinja", ".mako")]
    used = {word for path in templates for word in re.findall(r"\w+", path.read_text("utf-8"))}
    for path in (*MODULES, *(path.relative_to(ROOT) for path in (ROOT / "migrations").rglob("*.py"))):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Name | ast.Attribute):
                used.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif (
                isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMES_A_MODULE.fullmatch(node.value)
            ):
                used.add(node.value.partition(":")[2])
    unused = [
        f"{path}: {node.name}"
        for path in MODULES
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list and node.name not in used
    ]
    assert unused == []


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


def test_what_tests_and_benchmarks_import_is_there() -> None:
    """mypy reads neither; many of these modules run rarely, or on a card alone."""
    readers = sorted(
        path.relative_to(ROOT) for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    )
    missing = [
        f"{path}:{node.lineno}: {module}.{alias.name}"
        for path in readers
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and (module := _module(path, node)).split(".")[0] in ("loractl", *OURS)
        for alias in node.names
        if not _has(module, alias.name)
    ]
    assert missing == []


def _module(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = path.parts[: len(path.parts) - node.level]
    return ".".join((*package, *([node.module] if node.module else [])))


@functools.cache
def _file(module: str) -> Path | None:
    place = Path(*module.removeprefix("loractl.").split("."))
    found = (place / "__init__.py", place.with_suffix(".py"), Path("src") / place / "__init__.py")
    return next((path for path in found if (ROOT / path).is_file()), None)


@functools.cache
def _names(path: Path) -> frozenset[str]:
    names = set[str]()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return frozenset(names)


def _has(module: str, name: str) -> bool:
    path = _file(module)
    return path is not None and (name in _names(path) or name == "*" or _file(f"{module}.{name}") is not None)


def test_the_trainers_that_stand_in_load_no_training_stack() -> None:
    """Tests start hundreds of them: with torch each takes seconds of CPU, and workers look slow that are not."""
    program = (
        "import sys, tests.quick_trainer, tests.chaos.trainer\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
