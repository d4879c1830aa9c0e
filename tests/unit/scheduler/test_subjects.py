"""The rules of the client's rooms that import-linter does not know: what a subject opens, and the order in it.

A room is a subject, but for those whose door opens all of it.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
CLIENT = ROOT / "scheduler"
MODULES = frozenset(path.with_suffix("") for path in CLIENT.glob("*/**/*.py") if path.name != "__init__.py")
PRINT = ("command", "follow", "admission")


def room(module: Path) -> str:
    return module.relative_to(CLIENT).parts[0]


ROOMS = sorted({room(module) for module in MODULES})


def level(module: Path) -> int:
    """What prints is above texts, and they are above answers."""
    return 3 if module.name in PRINT else 2 if module.name == "text" or module.name.endswith("_text") else 1


@functools.cache
def opened(subject: str) -> tuple[str, ...] | None:
    """The modules that its door names, between "Others use" and the full stop. None: all of it."""
    said = re.search(r"Others use ([^.]+)\.", (CLIENT / subject / "__init__.py").read_text("utf-8"))
    assert said is not None, f"{subject} does not say what others use of it"
    return None if said[1] == "all of it" else () if said[1] == "nothing of it" else tuple(said[1].split(", "))


def used(module: Path) -> set[Path]:
    """The client's modules that a module imports, at its head or in a function."""
    names = set()
    for node in ast.walk(ast.parse(module.with_suffix(".py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            there = module.parents[node.level - 1] if node.level else ROOT
            place = there.joinpath(*(node.module or "").removeprefix("loractl.").split("."))
            names |= {place, *(place / alias.name for alias in node.names)}
    return names & MODULES


@functools.cache
def uses() -> list[tuple[Path, Path]]:
    return [(module, other) for module in sorted(MODULES) for other in sorted(used(module))]


def told(module: Path) -> str:
    return str(module.relative_to(CLIENT))


def test_a_subject_uses_of_another_what_that_one_s_door_names() -> None:
    assert len(uses()) > 200
    apart = [(module, other) for module, other in uses() if room(module) != room(other)]
    closed = [(told(a), told(b)) for a, b in apart if (names := opened(room(b))) is not None and b.name not in names]
    assert closed == []


def test_a_door_names_modules_that_are_used_and_neither_a_command_nor_a_text() -> None:
    named = {CLIENT / subject / name for subject in ROOMS for name in opened(subject) or ()}
    needed = {other for module, other in uses() if room(module) != room(other) and opened(room(other)) is not None}
    assert sorted(map(told, named - needed)) == []
    assert [told(module) for module in sorted(named) if module.name == "command" or level(module) == 2] == []


def test_in_a_subject_commands_use_texts_and_texts_use_answers() -> None:
    within = [(a, b) for a, b in uses() if room(a) == room(b) and opened(room(a)) is not None]
    assert [(told(a), told(b)) for a, b in within if level(b) > level(a)] == []


def test_a_command_shapes_no_json() -> None:
    commands = [module.with_suffix(".py") for module in MODULES if module.name == "command"]
    assert len(commands) > 10
    assert [
        told(path) for path in commands if re.search(r"^\s*(import|from) json\b", path.read_text("utf-8"), re.M)
    ] == []
