"""A YAML document that a person wrote: its mapping, with the line of each key, within limits."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from loractl.common.errors import SpecError, SpecProblem
from loractl.common.text import slip_of

MAX_FILE_BYTES = 256 * 1024
"""A job file is settings, not data."""

MAX_NODES = 20_000
"""Keys and values of a job file once YAML's aliases are written out: nested aliases double with every line."""

MAX_DEPTH = 16
"""Levels of nesting; the deepest key of a job has three."""

MAX_DIGITS = 64
"""Digits of a whole number: Python does not read or print thousands of them."""


JOB_FILE = "a job file"

EXAMPLE = "examples/helpdesk-lora.yaml"


Document = tuple[dict[str, Any], dict[tuple[str, ...], int]]
"""A mapping, and the line of the file (from 1) of each key path."""


def read_yaml(path: Path, what: str = JOB_FILE) -> Document:
    """The file's only document. Raises SpecError; `what`: the file's kind."""
    first, *others = read_documents(path, what)
    if others:
        said = f"holds {1 + len(others)} documents, and one is wanted here"
        hint = "loractl submit takes them all; write the one you mean into a file of its own"
        raise SpecError([SpecProblem(file=str(path), line=None, key="", what=said, hint=hint)])
    return first


def read_documents(path: Path, what: str = JOB_FILE) -> list[Document]:
    """The documents in the file, at least one, separated by ---. Raises SpecError; `what`: the file's kind."""
    file, ours = str(path), what == JOB_FILE
    like = f"{what} is like {EXAMPLE}" if ours else ""

    def wrong(what: str, hint: str | None = None, line: int | None = None) -> SpecError:
        return SpecError([SpecProblem(file=file, line=line, key="", what=what, hint=hint)])

    try:
        with path.open("rb") as stream:
            size, raw = os.fstat(stream.fileno()).st_size, stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        beside = {other.stem: other for ending in ("yaml", "yml") for other in path.parent.glob(f"*.{ending}")}
        close = slip_of(path.stem, beside)
        there = f"did you mean {beside[close]}?" if close else "name an existing file"
        raise wrong("no such file", f"{there}; {like}" if ours and not close else there) from None
    except IsADirectoryError:
        raise wrong(f"is a folder, not {what}", "name one file in it") from None
    except OSError as error:
        raise wrong(f"can't be read: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise wrong(
            f"has {max(size, len(raw))} bytes, {what} at most {MAX_FILE_BYTES}",
            "put the data into a separate file" + (": dataset.path" if ours else ""),
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        others = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin-1"
        way = f"save it as UTF-8, or convert it: iconv -f {others} -t utf-8 {path.name}"
        raise wrong("is not UTF-8 text", way, line=raw.count(b"\n", 0, error.start) + 1) from None
    try:
        documents = _documents(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        if "'\\t'" in str(error.problem):
            raise wrong("tab character not allowed", "indent with two spaces", line=line) from None
        other = f"{what} is YAML" + (f", like {EXAMPLE}; its dataset.path names the data" if ours else "")
        hint = slip_in(error) if path.suffix in (".yaml", ".yml") else other
        raise wrong(f"is not valid YAML: {error.problem or error}", hint, line=line) from None
    except yaml.reader.ReaderError as error:
        at = text.count("\n", 0, error.position) + 1
        raise wrong(f"holds a character that no text has, U+{error.character:04X}", "delete it", line=at) from None
    except yaml.YAMLError as error:
        raise wrong(f"is not valid YAML: {error}") from None
    found: list[Document] = []
    for lines, tree in documents:
        if not isinstance(tree, dict):
            if tree is None:
                raise wrong("is empty", f"start from {EXAMPLE}" if ours else None)
            kind = "a list" if isinstance(tree, list) else "one text"
            raise wrong(f"is {kind}, not keys", "write a colon and a space after each key, like name: mine")
        found.append((tree, lines))
    return found


_BACKSLASH = "in double quotes a backslash begins a special character: write single quotes, and / between folders"

_SLIPS = {
    "expected <block end>": "the keys of one section begin in the same column",
    "mapping values are not allowed": "here or one line above: a missing colon, a key in the wrong column, or an "
    "unquoted text with a colon",
    "found unknown escape character": _BACKSLASH,
    "expected escape sequence": _BACKSLASH,
    "found unhashable key": "a key is one text; a value that begins with a bracket or a brace goes into quotes",
    "could not find expected ':'": "write a colon and a space after a key, like name: mine",
    "expected ',' or": "the bracket of line {line} is not closed",
    "found unexpected end of stream": "the quote of line {line} is not closed",
    "YAML reads": "write decimal digits without a leading zero, or put quotes around what is a time or a text",
}
"""What people did wrong when PyYAML says this. `line`: where the bracket or the quote was opened."""


def slip_in(error: yaml.MarkedYAMLError) -> str | None:
    """A hint for what the person probably did; None if it is not known."""
    begun = error.context_mark.line + 1 if error.context_mark else None
    hint = next((hint for words, hint in _SLIPS.items() if str(error.problem).startswith(words)), None)
    return None if hint is None or ("{line}" in hint and begun is None) else hint.format(line=begun)


def load_yaml(text: str) -> tuple[dict[tuple[str, ...], int], Any]:
    """The line (from 1) of each key path, and the value. Raises YAMLError, also beyond the limits of size and depth."""
    first, *others = _documents(text)
    if others:
        raise yaml.YAMLError("it holds several documents")
    return first


def _documents(text: str) -> list[tuple[dict[tuple[str, ...], int], Any]]:
    """The lines and the value, as load_yaml, of each document that is not empty, or of one empty document. Raises
    YAMLError."""
    try:
        nodes = list(yaml.compose_all(text, Loader=_Loader))
        for node in nodes:
            _check_extent(node)
        values = list(yaml.load_all(text, Loader=_Loader))
        found = [(dict(_lines(node, ())), value) for node, value in zip(nodes, values, strict=True)]
        return [one for one in found if one[1] is not None] or found[:1] or [({}, None)]
    except RecursionError:
        raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
        # PyYAML lets Python's own errors through: for a wrong date or number, and for a tag on the wrong kind
        raise yaml.YAMLError(str(error) or type(error).__name__) from None


class _Loader(yaml.SafeLoader):
    """YAML's safe loader. Keys are the text as written, also 1, true and ~. It refuses whole numbers that are too long
    for Python to print, and those that YAML 1.1 silently reads in base 8 and 60."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):  # else the loader's own says what and where, as of "!!map [a]"
            self.flatten_mapping(node)
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    key.tag = self.DEFAULT_SCALAR_TAG
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(str(node.value)) > MAX_DIGITS:
            problem = f"a number of more than {MAX_DIGITS} digits"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        number = int(super().construct_yaml_int(node))
        if other := _OTHER_BASE.match(str(node.value)):
            problem = f"YAML reads {node.value} in base {60 if other[1] else 8}, as {number}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return number


_OTHER_BASE = re.compile(r"[-+]?(?:[\d_]+(:)|0[\d_])")
"""1:30, which is 90, and 010, which is 8. 0x10 and 0b10 say their base."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _check_extent(node: yaml.Node) -> None:
    """Raises YAMLError when `node` holds too much: a few lines of nested aliases make billions of values."""
    size, height = _extent(node, {})
    if size > MAX_NODES:
        raise yaml.YAMLError(f"it has more than {MAX_NODES} keys and values, its aliases written out")
    if height > MAX_DEPTH:
        raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH} levels")


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(number, levels) of the nodes from `node` down, every alias written out. RecursionError: a node holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1, 0
    if id(node) not in known:
        parts = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        below = [_extent(part, known) for part in parts]
        known[id(node)] = 1 + sum(size for size, _ in below), 1 + max((height for _, height in below), default=0)
    return known[id(node)]


def _lines(node: yaml.Node | None, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    lines: list[tuple[tuple[str, ...], int]] = []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key: {'.'.join(here)}", problem_mark=key.start_mark)
            seen.add(here)
            lines.append((here, key.start_mark.line + 1))
            lines += _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines.append(((*path, str(index)), item.start_mark.line + 1))
    return lines
