"""The lower bounds that docs/security.md promises are those of pyproject.toml, and are what is installed here."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text("utf-8")
PROMISED = dict(re.findall(r"^\| ([a-z0-9]+) \| ([\d.]+) \| .*CVE-", PAGE, re.MULTILINE))


def bounds() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for name in ("worker", "web") for line in project["optional-dependencies"][name]),
    ]
    lines += importlib.metadata.requires("datasets") or []  # pyarrow comes with it
    found: dict[str, str] = {}
    for line in lines:
        match = re.match(r"([\w-]+)(?:\[\w+\])?.*?>=([\d.]+)", line)
        if match and "extra ==" not in line:
            found[match[1].lower()] = max(found.get(match[1].lower(), "0"), match[2], key=_numbers)
    return found


def test_the_page_names_bounds_at_all() -> None:
    assert set(PROMISED) == {"torch", "jinja2", "transformers", "pyarrow", "pyyaml", "celery", "starlette"}


@pytest.mark.parametrize("package", PROMISED)
def test_no_older_release_than_promised_is_installed_with_loractl(package: str) -> None:
    assert _numbers(bounds()[package]) >= _numbers(PROMISED[package])
    assert _numbers(importlib.metadata.version(package)) >= _numbers(PROMISED[package])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:unit|integration|acceptance|fuzz)/[\w/.]+)`", PAGE))))
def test_each_test_that_the_page_names_is_there(path: str) -> None:
    assert (ROOT / "tests" / path).exists()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))
