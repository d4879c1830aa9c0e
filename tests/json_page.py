"""docs/json.md, the list of what --json prints: read, held against printed values, and written.

Keys and types are written by the tests, the page is the only place of the words. With JSON_PAGE=write a test that holds
a section writes it first: known keys keep their words, new ones get a question mark, which fails until somebody
replaces it, or removes it where the key says all.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "json.md"
WRITE = os.environ.get("JSON_PAGE") == "write"

SPREAD = "…"
"""The keys of another section, among those of this one."""

NOT_SEEN = " †"
"""Of a key without a value in what the tests print: its type and its words are by hand."""

_LINK = re.compile(r"\[[^]]+\]\(([^)]+)\)")
_PLURAL = {"list": "lists", "object": "objects"}
_EMPTY = {"null", "list"}
"""What proves no type."""


@dataclass
class Row:
    """A key: its types as the page writes them, its words, and whether the tests print it."""

    types: str = ""
    words: str = "?"
    seen: bool = True

    @property
    def atoms(self) -> set[str]:
        return set(_LINK.sub("object", self.types).split(" or "))

    @property
    def link(self) -> str | None:
        """Where the keys of this object are listed: an anchor of this page, or another page."""
        found = _LINK.search(self.types)
        return found[1] if found else None


@dataclass
class Section:
    """A heading, the lines of text below it, and its rows by path."""

    title: str
    text: list[str] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        return re.sub(r"[^\w -]", "", self.title.lower()).replace(" ", "-")

    @property
    def names(self) -> set[str]:
        """The keys at the top."""
        return {re.split(r"[.\[]", path)[0] for path in self.rows}

    def any_name(self, path: str) -> str | None:
        """The name in capitals that stands for every key below this path."""
        below = (row.removeprefix(path).lstrip(".") for row in self.rows if row.startswith(path))
        return next((name[0] for rest in below if (name := re.match(r"[A-Z_]+(?=$|[.\[])", rest))), None)


Printed = dict[str, dict[str, set[str]]]
"""Types by section and path."""


def read() -> list[Section]:
    """The page's sections; the first is what stands above them, without a title."""
    sections = [Section(title="")]
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("## "):
            sections.append(Section(title=line.removeprefix("## ")))
        elif row := re.fullmatch(r"\| `(.*?)`( †)? \| (.*?) \| (.*) \|", line):
            sections[-1].rows[row[1]] = Row(types=row[3], words=row[4], seen=row[2] is None)
        elif line not in ("| key | type | meaning |", "| --- | --- | --- |"):
            sections[-1].text.append(line)
    return sections


def write(sections: Iterable[Section]) -> None:
    """The page anew."""
    PAGE.write_text("\n\n".join("\n".join(_lines(section)).strip("\n") for section in sections) + "\n", "utf-8")


def _lines(section: Section) -> Iterator[str]:
    yield from [f"## {section.title}"] * bool(section.title)
    yield from "\n".join(section.text).strip().splitlines()
    if section.rows:
        yield from ("", "| key | type | meaning |", "| --- | --- | --- |")
    for path, row in section.rows.items():
        yield f"| `{path}`{'' if row.seen else NOT_SEEN} | {row.types} | {row.words} |"


def hold(printed: Mapping[str, Sequence[Any]], shared: Iterable[str] = ()) -> None:
    """Each section of these titles lists just what these values have. The sections that they lead to list that, too,
    and those of `shared` no more. Raises AssertionError."""
    sections = {section.anchor: section for section in read()}
    seen: Printed = defaultdict(dict)
    own = {section.anchor: printed[section.title] for section in sections.values() if section.title in printed}
    assert len(own) == len(printed), f"docs/json.md has no section for {set(printed)} but {set(own)}"
    for anchor, values in own.items():
        for value in values:
            _walk(json.loads(json.dumps(value)), "", sections[anchor], sections, seen)
    whole = {*own, *(section.anchor for section in sections.values() if section.title in {*shared})}
    if WRITE:
        for anchor, paths in seen.items():
            _renew(sections[anchor], paths, whole=anchor in whole)
        write(sections.values())
    faults = [
        f"{sections[anchor].title}: {fault}"
        for anchor, paths in seen.items()
        for fault in _faults(sections[anchor], paths, whole=anchor in whole)
    ]
    assert not faults, "docs/json.md (JSON_PAGE=write writes it):\n" + "\n".join(faults)


def _walk(value: Any, path: str, section: Section, sections: dict[str, Section], seen: Printed) -> None:
    row = section.rows.get(path)
    if path and not path.endswith("[]"):
        seen[section.anchor].setdefault(path, set()).add(_type(value))
    if isinstance(value, dict) and row is not None and row.link is not None:
        seen[section.anchor].setdefault(path, set()).add("object")
        if row.link.startswith("#"):
            _walk(value, "", sections[row.link[1:]], sections, seen)
    elif isinstance(value, dict):
        prefix = f"{path}." if path else ""
        spread = section.rows.get(f"{prefix}{SPREAD}")
        if spread is not None and spread.link is not None:
            seen[section.anchor].setdefault(f"{prefix}{SPREAD}", set()).add("object")
            shared = sections[spread.link[1:]]
            _walk({key: inner for key, inner in value.items() if key in shared.names}, "", shared, sections, seen)
            value = {key: inner for key, inner in value.items() if key not in shared.names}
        any_name = section.any_name(path)
        for key, inner in value.items():
            name = key if f"{prefix}{key}" in section.rows or any_name is None else any_name
            _walk(inner, f"{prefix}{name}", section, sections, seen)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict):
                _walk(inner, f"{path}[]", section, sections, seen)


def _type(value: Any) -> str:
    if isinstance(value, list):
        kinds = {_type(one).partition(" of ")[0] for one in value}
        named = "number" if kinds == {"integer", "number"} else " and ".join(sorted(kinds))
        return f"list of {_PLURAL.get(named, named)}" if kinds else "list"
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true/false"
    return {int: "integer", float: "number", str: "text", dict: "object"}[type(value)]


def _fits(kind: str, atoms: set[str]) -> bool:
    wider = {kind, kind.replace("integer", "number"), "list of any" if kind.startswith("list") else "any"}
    return bool(wider & atoms) or (kind == "list" and any(atom.startswith("list") for atom in atoms))


def _faults(section: Section, paths: dict[str, set[str]], *, whole: bool) -> Iterator[str]:
    for path, kinds in paths.items():
        row = section.rows.get(path)
        if row is None:
            yield f"`{path}` is printed and not on the page"
            continue
        yield from (f"`{path}` is {row.types}, and printed is {kind}" for kind in kinds if not _fits(kind, row.atoms))
        if not row.seen and whole and kinds - _EMPTY:
            yield f"`{path}` is printed: it needs no †"
        unused = {atom for atom in row.atoms - {"null"} if not any(_fits(kind, {atom}) for kind in kinds)}
        if row.seen and whole and kinds - _EMPTY and unused:
            yield f"`{path}` is {row.types}, and no {' or '.join(unused)} is printed"
        if row.seen and whole and not kinds - _EMPTY:
            yield f"`{path}` is printed as null or an empty list alone: give its type, when it has a value, and a †"
    yield from (f"`{path}` has no meaning" for path, row in section.rows.items() if row.words.strip() == "?")
    for path, row in section.rows.items():
        if whole and row.seen and path not in paths:
            yield f"`{path}` is on the page and not printed"


def _renew(section: Section, paths: dict[str, set[str]], *, whole: bool) -> None:
    """The rows in the order in which they are printed, with their words; a row that is not seen stays where it is."""
    old = section.rows
    for path, kinds in paths.items():
        row = old.setdefault(path, Row())
        row.seen |= whole and bool(kinds - _EMPTY)
        if (row.link is None and not all(_fits(kind, row.atoms) for kind in kinds)) or not row.types:
            found = kinds | ({"null"} & row.atoms)
            found -= {"list"} if any(kind.startswith("list of") for kind in found) else set()
            found -= {"integer"} if "number" in found else set()
            found -= {"list of integer"} if "list of number" in found else set()
            row.types = " or ".join(sorted(found, key=lambda kind: (kind == "null", kind)))
    kept = {path: row for path, row in old.items() if path in paths or not row.seen or not whole}
    section.rows = _in_order(kept, list(paths)) if whole else kept


def _in_order(rows: dict[str, Row], printed: list[str]) -> dict[str, Row]:
    """As printed, the keys of an object below it; what is not printed stays behind the row that it stood behind."""
    order = [path for path in printed if path in rows]
    last = -1
    for path in rows:
        if path not in order:
            order.insert(last + 1, path)
        last = order.index(path)
    first: dict[str, int] = {}
    for place, path in enumerate(order):
        for above in _branch(path):
            first.setdefault(above, place)
    return {path: rows[path] for path in sorted(order, key=lambda path: [first[above] for above in _branch(path)])}


def _branch(path: str) -> list[str]:
    """a, a.b and a.b.c of a.b.c."""
    names = path.replace("[]", "").split(".")
    return [".".join(names[: n + 1]) for n in range(len(names))]
