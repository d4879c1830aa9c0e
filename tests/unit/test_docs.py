"""The documentation keeps up with the code: the site builds without a warning, and links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
from sqlalchemy import create_engine

from loractl.common.job.method import Need
from loractl.common.job.spec import spec_keys
from loractl.common.placement.cards import Card, Occupant, Reservation
from loractl.common.placement.gangs import GangShare
from loractl.common.placement.lines import Waiting
from loractl.common.placement.preemption import Preemption
from loractl.common.placement.rule import Placement
from loractl.common.store.store import Store, Subject
from loractl.scheduler.cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {"models", "build", "dist", "shared"} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_site_builds_and_its_reference_has_each_command_option_and_key(tmp_path: Path) -> None:
    """Zensical ends with an error at a link or an anchor that is not there."""
    built = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", tmp_path], capture_output=True, text=True, env=os.environ
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "index.html").exists()
    foreign = re.compile(r'<(?:script|img|iframe)[^>]* src="?(?:https?:)?//|<link[^>]* rel="?stylesheet[^>]*//')
    for html in (tmp_path / "site").rglob("*.html"):
        assert not foreign.search(html.read_text("utf-8")), f"{html.name} loads what is not of the site"
    for source in (tmp_path / "docs").rglob("*.md"):
        assert "```mermaid" not in source.read_text("utf-8"), f"the site shows a drawing of {source.name} as its source"
    commands = (tmp_path / "docs" / "reference" / "commands.md").read_text("utf-8")
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for path, option in options(command, name):
            assert f" {path} {{#" in commands and option in commands, f"{path} {option}"
    assert "| `scheduler/why` | Why one job waits" in (tmp_path / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(
        r"^\| `([\w.]+)`<br>.+<br>[^|]+ \| (.*) \|$", (tmp_path / "docs/reference/job-file.md").read_text("utf-8"), re.M
    )
    assert {key for key, _ in rows} >= set(spec_keys())
    assert [key for key, meaning in rows if not meaning] == [], "the field in common/job has no docstring"
    rule, store = ((tmp_path / f"docs/reference/{name}.md").read_text("utf-8") for name in ("rule", "store"))
    for value in (Waiting, Need, Card, Occupant, Placement, GangShare, Reservation, Preemption):
        section = rule.partition(f"\n## {value.__name__}\n")[2].partition("\n## ")[0]
        own = vars(value)["__annotations__"]
        assert own and [name for name in own if f"{name}: " not in section] == [], value
    for subject, verbs in vars(Store(create_engine("sqlite://"))).items():
        section = store.partition(f"\n## store.{subject}\n")[2].partition("\n## ")[0]
        for name in dir(verbs) if isinstance(verbs, Subject) else ():
            told = name.startswith("_") or re.search(rf"^\| `{name}\(.*\| [A-Z].*\. \|$", section, re.M)
            assert told, f"{subject}.{name} has no first sentence"


@pytest.mark.parametrize(("name", "least"), [("reliability.md", 100), ("architecture.md", 6)])
def test_every_test_that_a_promise_names_exists(name: str, least: int) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page(name))
    assert len(named) >= least
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} has no {test}"


def test_every_promise_names_a_test_and_every_test_of_the_promises_is_named() -> None:
    promises = re.split(r"\n\*\*(?=\d+\. )", page("reliability.md").partition("\n## Where they end")[0])[1:]
    assert [promise.partition(".")[0] for promise in promises] == [str(n) for n in range(1, 11)]
    assert all("::test_" in promise for promise in promises)
    for file in ("acceptance/test_outages.py", "acceptance/test_bad_boxes.py"):
        written = re.findall(r"\ndef (test_\w+)\(", (ROOT / "tests" / file).read_text("utf-8"))
        assert written and all(f"{file}::{test}`" in page("reliability.md") for test in written)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in links(path):
        if target.partition("docs/")[2].startswith("reference/") or target.startswith("reference/"):
            continue  # of the site alone
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name} links to {target}, which does not exist"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{path.name} links to {target}: there is no such heading"


def test_the_readme_s_table_of_cards_is_the_plan_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    rows = import_module("benchmarks.cards").fits()
    assert "\n".join(rows) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_of_one_example_are_of_one_run() -> None:
    """Each page shows what a newcomer sees, and none of them another result than the next one."""
    found = sorted(figures())
    assert {name for (name, _), _, _ in found} >= {"helpdesk-lora"} and len(found) > 8
    by_measure: dict[tuple[str, str], dict[str, str]] = {}
    for measure, numbers, place in found:
        by_measure.setdefault(measure, {})[numbers] = place
    assert {measure: told for measure, told in by_measure.items() if len(told) > 1} == {}


def figures() -> Iterator[tuple[tuple[str, str], str, str]]:
    """((job, measure), numbers, page) of each example's results in README.md and docs: of a sentence, base and tuned;
    of a row of its report, all but the words."""
    names = "|".join(sorted(path.stem for path in (ROOT / "examples").glob("*.yaml")))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        job = None
        for line in path.read_text(encoding="utf-8").splitlines():
            if sentence := re.search(rf"\b({names})\b.*\bloss ([0-9.]+ -> [0-9.]+[0-9])", line):
                yield (sentence[1], "loss"), sentence[2], path.name
            if title := re.match(r"(?: {4})?\d+ ([\w-]+): ", line):
                job = title[1] if re.fullmatch(names, title[1]) else None
            elif job and (
                row := re.match(r"(?: {4})?(\w.*?, (?:%|nats)|perplexity) +([0-9.]+) +([0-9.]+) +(.*)  ", line)
            ):
                yield (job, f"{row[1]} of the report"), f"{row[2]} -> {row[3]}, {' '.join(row[4].split())}", path.name
            elif line.strip("`").startswith("$ loractl") or line.startswith("#"):
                job = None


def options(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    """(path, option) of a command and of what is below it."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield from ((path, option) for option in parameter.opts if not parameter.hidden)
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield f"{path} {name}", name
            yield from options(below, f"{path} {name}")


def links(path: Path) -> Iterator[str]:
    """Targets of a page's inline links, outside of code and without those to other sites."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`(?!\])", "", text)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
