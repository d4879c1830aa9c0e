"""Makes the site: python docs/build.py FOLDER writes the pages and mkdocs.yml there, then builds FOLDER/site.

README.md is its first page. What follows from the code is written here and kept nowhere: the commands from click, the
job file's keys from its models, JSON keys from the answers, the reasons of an attempt from their table, the fields of
other trainers from the reader, the rooms from their packages, the faces of rule and store from what they are. A link
that leads out of the pages becomes its text.
"""

from __future__ import annotations

import ast
import html
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
from annotated_types import Ge, Gt, Interval, Le, Lt, MaxLen
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from sqlalchemy import create_engine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from loractl.common.errors import ExitCode  # noqa: E402
from loractl.common.job.sections import OwnMetric, SourceSpec  # noqa: E402
from loractl.common.job.spec import JobSpec  # noqa: E402
from loractl.common.job.status import OUTCOMES  # noqa: E402
from loractl.common.placement.preemption import first_stop  # noqa: E402
from loractl.common.placement.rule import place  # noqa: E402
from loractl.common.store.store import Store, Subject  # noqa: E402
from loractl.scheduler.cli.main import SECTIONS, cli  # noqa: E402
from tests import json_page  # noqa: E402
from tests.fields_table import lines as fields  # noqa: E402

FILES_OWN = {"dataset.fields": "all"}
"""Defaults of a job file where a stored spec without the key means another value."""


def pages() -> Iterator[tuple[str, str]]:
    """Each page of the site: its path, and its text."""
    for path in sorted((ROOT / "docs").glob("**/*.md")):
        name = path.relative_to(ROOT / "docs").as_posix()
        yield name, within(path.read_text("utf-8"), name)
    for source, name in (("README.md", "index.md"), ("CONTRIBUTING.md", "contributing.md")):
        text = (
            (ROOT / source)
            .read_text("utf-8")
            .replace("](docs/", "](")
            .replace("](CONTRIBUTING.md", "](contributing.md")
        )
        yield name, re.sub(r"(?<!!)\[([^\]]+)\]\((?:CHANGELOG\.md|LICENSE)\)", r"\1", text)
    yield "reference/commands.md", "\n".join(commands())
    yield "reference/job-file.md", "\n".join(job_file())
    yield "reference/json.md", "\n".join([JSON_TEXT, *json_page.lines(), ""])
    yield "reference/errors.md", "\n".join(errors())
    yield "reference/fields.md", "\n".join(["# Fields of other trainers", "", FIELDS, "", *fields(), ""])
    yield "reference/rule.md", "\n".join(rule())
    yield "reference/store.md", "\n".join(store())


JSON_TEXT = """# What --json prints

After this page you can read what any command prints with `--json`. Words and types are those of the code; things that
several commands print come first. Times are text, ISO 8601 in UTC. Bytes and seconds are numbers without a unit. What
is not known is null. A list command (`adapters`, `gpus`, `quota`, `status`, `submit`) prints a list. `spec`, and what
`submit --dry-run` prints, has [the keys of a job file](job-file.md). New keys may be added in any version."""


FIELDS = """After this page you know what becomes of a field that Axolotl, LLaMA-Factory or TRL document. No field of
a row is dropped silently: it is used, named in the data check, or refused with a sentence."""


def within(text: str, name: str) -> str:
    """A page's text. Links to README and CONTRIBUTING stay in the site, others out of docs/ become their text."""
    up = "../" * name.count("/")
    text = text.replace(f"]({up}../README.md", f"]({up}index.md").replace(
        f"]({up}../CONTRIBUTING.md", f"]({up}contributing.md"
    )
    text = re.sub(rf"(?<!!)\[([^\]]+)\]\({re.escape(up)}\.\./[^)]*\)", r"\1", text)
    text = re.sub(r"<!-- rooms: .* -->", lambda _: "\n".join(rooms()), text)
    return re.sub(r"\n\n((?:- `\S+::\S+`.*\n)+)", folded, text)


def rooms() -> Iterator[str]:
    """The table of rooms, from what their packages say first."""
    yield from ("| room | what belongs there, and what may not come in |", "| --- | --- |")
    for floor in ("common", "scheduler", "worker"):
        for file in sorted((ROOT / floor).glob("*/__init__.py")):
            first = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n\n")[0]
            yield f"| `{floor}/{file.parent.name}` | {cell(first)} |"


def folded(tests: re.Match[str]) -> str:
    """A list of tests, behind a line that opens it."""
    lines = tests[1].splitlines()
    return "\n".join(
        [f'\n\n??? note "Shown by {len(lines)} test{"s" * (len(lines) > 1)}"', "", *(f"    {x}" for x in lines), "", ""]
    )


COMMANDS_TEXT = """What `loractl COMMAND --help` prints, made from the code. Data goes to stdout, everything else to
stderr. With `--json` a command prints one JSON value ([its keys](json.md)). JOB is a job's number, a name that only
one job has, or a tag of its adapter (`support:prod`). `loractl --debug COMMAND` shows an error's traceback."""


def commands() -> Iterator[str]:
    """The page of all commands, from what their --help says."""
    yield from ("# Commands", "", "After this page you can call each command with each of its options.", "")
    yield COMMANDS_TEXT
    yield from ("", "| exit code | meaning |", "| --- | --- |")
    yield from (f"| {int(code)} | {code.name.lower().replace('_', ' ')} |" for code in ExitCode)
    for section, names in SECTIONS.items():
        yield from ("", f"## {section}")
        for name in names:
            command = cli.get_command(click.Context(cli), name)
            assert command is not None
            yield from one_command(command, click.Context(command, info_name=f"loractl {name}"), 3)


def one_command(command: click.Command, context: click.Context, level: int) -> Iterator[str]:
    """Its usage, text and options, and the commands below it."""
    name = context.command_path.removeprefix("loractl ")
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (
        "",
        f"{'#' * level} {name} {{#{name.replace(' ', '-')}}}",
        "",
        f"    {context.command_path} {usage}",
        "",
    )
    yield from paragraphs(command.help or "")
    options = [option for one in command.get_params(context) if (option := one.get_help_record(context)) is not None]
    options = [option for option in options if "--help" not in option[0]]
    if options:
        yield from ("", "| option | |", "| --- | --- |")
        yield from (f"| {cell(f'`{names}`')} | {cell(text)} |" for names, text in options)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            one = command.get_command(context, below)
            assert one is not None
            if not one.hidden:
                yield from one_command(one, click.Context(one, info_name=below, parent=context), level + 1)


def paragraphs(text: str) -> Iterator[str]:
    """A help text as Markdown: what click must not wrap stays as it is."""
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith("\b"):
            yield from ("", *(f"    {line}" for line in paragraph.removeprefix("\b").strip("\n").splitlines()), "")
        else:
            yield from (prose(" ".join(paragraph.split())), "")


JOB_FILE_TEXT = """Made from the models that check a job file. How keys work together: [jobs](../jobs.md),
[data](../data.md), [results](../results.md). Sizes are bytes or written like `20GiB`; durations are seconds or written
like `90s`, `2h`, `1h30m`. `null` means: not set."""


def job_file() -> Iterator[str]:
    """The page of all keys, from the models that check a job file."""
    yield from ("# Keys of the job file", "", "After this page you can set any key of a job file.", "")
    yield JOB_FILE_TEXT
    yield from section(JobSpec, "", "The job")
    for model, title in ((SourceSpec, "dataset.more"), (OwnMetric, "evaluation.metrics, a measure of your own")):
        yield from section(model, "", title)


def section(model: type[BaseModel], prefix: str, title: str) -> Iterator[str]:
    """A table of the keys of one model, and the tables of the models in it."""
    below = []
    yield from ("", f"## {title}", "")
    if prefix:
        yield from (prose(" ".join((model.__doc__ or "").split())), "")
    yield from ("| key, type, default | |", "| --- | --- |")
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below.append((field.annotation, name))
        elif not field.exclude:
            key = f"{prefix}{name}"
            kind = kind_of(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
            meaning = prose(" ".join((field.description or "").split()))
            yield f"| `{key}`<br>{cell(prose(kind))}<br>{default_of(key, field)} | {cell(meaning)} |"
    for inner, name in below:
        yield from section(inner, f"{prefix}{name}.", f"{prefix}{name}")


def default_of(key: str, field: FieldInfo) -> str:
    """The default of a key in a job file."""
    if field.is_required():
        return "required"
    default = FILES_OWN.get(key, field.get_default(call_default_factory=True, validated_data={}))
    return f"default `{written(default)}`"


def written(value: Any) -> str:
    """A default as a job file would have it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(written(one) for one in value)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) if value != {} else "{}"


NAMED = {
    "_size": "size",
    "parse_duration": "duration",
    "_methods": "auto, lora, qlora, or a list of the last two",
    "_cards": "auto, or 1 to 8",
    "_checkpointing": "true, false, half",
    "_steps_or_share": "whole number, or a share below 1",
    "_predecessors": "job or list of jobs: numbers, or names of the same submit",
    "_predecessor": "job",
    "_adapter_name": "adapter, {job: N} or {sweep: N}",
    "_losses": "name, or list of names",
}
"""Types by the function that reads them."""


def kind_of(annotation: Any) -> str:
    """A type in words, with its limits."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for mark in inner[1:]:
            if isinstance(mark, BeforeValidator) and mark.func.__name__ in NAMED:
                return NAMED[mark.func.__name__]
        limits = ", ".join(words for mark in flat(inner[1:]) if (words := limit(mark)))
        return kind_of(inner[0]) + (f", {limits}" if limits and not kind_of(inner[0]).startswith("list") else "")
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(kind_of(one) for one in inner if one is not type(None)))
    if origin is Literal:
        return ", ".join(str(one) for one in inner)
    if origin is list:
        return f"list of {kind_of(inner[0])}"
    if origin is dict:
        return "mapping of names"
    if isinstance(annotation, type) and issubclass(annotation, str) and hasattr(annotation, "__members__"):
        return ", ".join(str(one) for one in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}.get(annotation, "text")


def flat(marks: tuple[Any, ...]) -> Iterator[Any]:
    """Marks, and those in a pydantic Field among them."""
    for mark in marks:
        yield from getattr(mark, "metadata", (mark,))


def limit(mark: Any) -> str:
    match mark:
        case Ge(ge=low):
            return f"at least {low}"
        case Gt(gt=low):
            return f"above {low}"
        case Le(le=high):
            return f"at most {high}" if high != 2**31 - 1 else ""
        case Lt(lt=high):
            return f"below {high}"
        case MaxLen(max_length=most):
            return f"at most {most}"
        case Interval():
            return ", ".join(filter(None, map(limit, mark)))
    return ""


ERRORS_TEXT = """An error is one sentence and a hint, and its exit code is in [Commands](commands.md). A job's attempt
ends with one of these reasons; `loractl status JOB` prints the sentence behind it."""


def errors() -> Iterator[str]:
    """The page of reasons: what an attempt ended as, and what then."""
    yield from ("# Reasons and errors", "", "After this page you know what follows from how an attempt ended.", "")
    yield ERRORS_TEXT
    yield from ("", "| reason, then | what to do |", "| --- | --- |")
    for reason, meaning in OUTCOMES.items():
        then = "tried again" if meaning.retryable else str(meaning.status)
        counts = ", spends a retry" if meaning.counts else ""
        yield f"| `{reason}`<br>{then}{counts} | {cell(meaning.advice)} |"
    yield from ("", "After a failure that spends a retry, the job waits 10, 20, 40, ... at most 600 s.", "")


RULE_TEXT = """After this page you can call the [placement rule](../placement.md): two pure functions, and loractl's own
values that they take or give."""


def rule() -> Iterator[str]:
    """The page of the rule's face: its functions, and each value that is reached from them."""
    yield from ("# The rule's face", "", RULE_TEXT)
    reached: list[type] = []
    for function in (place, first_stop):
        reach(get_type_hints(function).values(), reached)
        *takes, gives = [f"{name}: {kind}" for name, kind in function.__annotations__.items()]
        yield from ("", f"## {function.__name__}", "", *paragraphs(inspect.getdoc(function) or ""))
        yield from ("```python", f"{function.__name__}(", *(f"    {one}," for one in takes), ") ->" + gives[7:], "```")
    for value in reached:
        also = "".join(f" It has also what {base.__name__} has." for base in value.__bases__ if base in reached)
        yield from ("", f"## {value.__name__}", "", prose(" ".join((value.__doc__ or "").split())) + also)
        yield from ("", "| | |", "| --- | --- |", *(methods(value) if is_protocol(value) else fields_of(value)))


def reach(kinds: Iterable[Any], reached: list[type]) -> None:
    """Adds those of the types that are loractl's own, and what their fields, or a protocol's methods, reach."""
    for kind in kinds:
        reach(kind if isinstance(kind, list) else get_args(kind), reached)
        if inspect.isclass(kind) and kind.__module__.startswith("loractl.") and kind not in reached:
            reached.append(kind)
            for one in (kind, *(vars(kind)[name] for name in public(kind) if is_protocol(kind))):
                reach(get_type_hints(one).values(), reached)


def public(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


def is_protocol(kind: type) -> bool:
    return getattr(kind, "_is_protocol", False)


FIELD = re.compile(r"^    (\w+)(?:: ([^=\n]+?))?(?: = (.+?))?(?:  # (.*))?$", re.M)
"""A line of a class: a field's name, type and default, or an enum's member, and the comment behind it."""


def fields_of(value: type) -> Iterator[str]:
    """The table rows of a value's fields or an enum's members. Those without a comment share one row."""
    silent = []
    for name, kind, default, meaning in FIELD.findall(inspect.getsource(value)):
        code = cell(f"`{name}: {kind}`" if kind else f"`{default}`")
        silent += [] if meaning else [code]
        if meaning:
            yield f"| {code} | {cell(prose(meaning))} |"
    if silent:
        yield f"| {'<br>'.join(silent)} | |"


def methods(of: Any) -> Iterator[str]:
    """Rows of the public methods: how one is called, what it gives, and the first sentence about it."""
    for name in public(of if inspect.isclass(of) else type(of)):
        about = inspect.signature(method := getattr(of, name))
        given = ", ".join(str(one).split(":")[0] for one in about.parameters.values() if one.name not in ("self", "tx"))
        gives = about.return_annotation.replace("Select[", "list[")
        first = re.split(r"(?<=\.)\s", " ".join((method.__doc__ or "").split()))[0]
        yield f"| {cell(f'`{name}({given})`')}<br>{cell(f'`{gives}`')} | {cell(prose(first))} |"


STORE_TEXT = """After this page you can find the verb that reads or changes what you need: `store.jobs.hold(7, "mara")`.
Each is one transaction. What it raises is in its docstring; how it locks: [what is stored](../store.md#locks)."""


def store() -> Iterator[str]:
    """The page of the store's face: the verbs of each subject."""
    yield from ("# The store's face", "", STORE_TEXT)
    for subject, verbs in vars(Store(create_engine("sqlite://"))).items():
        if isinstance(verbs, Subject):
            yield from ("", f"## store.{subject}", "", "| | |", "| --- | --- |", *methods(verbs))


def prose(text: str) -> str:
    """Text whose angle brackets, stars and braces Markdown must not read; in code it reads none."""
    return re.sub(r"(`[^`]*`)|([<*_\[\]])", lambda one: one[1] or f"\\{one[2]}", text)


def cell(text: str) -> str:
    """Text of a table's cell. Code that has a bar is HTML: Markdown would end the cell there, or show a backslash."""
    line = re.sub(r"`([^`]*\|[^`]*)`", lambda code: f"<code>{html.escape(code[1])}</code>", " ".join(text.split()))
    return line.replace("|", "&#124;")


def main(folder: Path) -> None:
    """Writes the pages into folder/docs and builds folder/site; a link that leads nowhere ends the build."""
    shutil.rmtree(folder / "docs", ignore_errors=True)
    for name, text in pages():
        path = folder / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    shutil.copytree(ROOT / "docs" / "images", folder / "docs" / "images", dirs_exist_ok=True)
    shutil.copy(ROOT / "docs" / "site.css", folder / "docs")
    shutil.copy(ROOT / "docs" / "mkdocs.yml", folder)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=folder)
    sys.exit(done.returncode)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    main(Path(sys.argv[1]))
