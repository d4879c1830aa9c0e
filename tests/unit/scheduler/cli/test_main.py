"""The command line: its commands and help, what it does not import, and an exit code for every ending."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from loractl import __version__
from loractl.common.errors import ExitCode
from loractl.scheduler.cli.main import COMMANDS, SECTIONS, cli

from ....conftest import Cli

IMPORTS = """
import sys
from loractl.scheduler.cli.main import main
sys.argv = ["loractl", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print("MODULES", *sorted({name.partition(".")[0] for name in sys.modules}))
    sys.exit(end.code)
"""


def imported(cli: Cli, *args: str) -> set[str]:
    """The top-level modules that a command has loaded when it starts cold and ends well."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *args], env=cli.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES ")[2].split())


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)  # type: ignore[attr-defined]
    assert found is not None
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_its_help_begins_with_the_line_that_the_list_shows(name: str) -> None:
    assert (command(name).help or "").splitlines()[0] == COMMANDS[name][1]
    assert COMMANDS[name][1].endswith(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_group_cuts_no_line(name: str) -> None:
    group = command(name)
    if isinstance(group, click.Group):
        told = CliRunner().invoke(group, ["--help"], env={"COLUMNS": "80"}).stdout.partition("Commands:")[2]
        assert told and "..." not in told


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str) -> None:
    options = [p for p in command(name).params if isinstance(p, click.Option)]
    assert [o.name for o in options if not o.help and not o.hidden] == []


def test_the_help_lists_every_command_in_its_order(cli: Cli) -> None:
    shown = cli("--help").stdout
    places = [shown.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert cli("-h").stdout == shown


def test_the_help_lists_the_commands_by_what_a_person_wants(cli: Cli) -> None:
    shown = cli("--help").stdout
    for heading, commands in SECTIONS.items():
        listed = shown.partition(f"\n{heading}:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^  (\S+)  ", listed, re.MULTILINE) == list(commands)


def test_the_help_imports_nothing_that_is_slow(cli: Cli) -> None:
    loaded = imported(cli, "--help")
    assert "loractl" in loaded
    assert not loaded & {"sqlalchemy", "celery", "kombu", "torch", "transformers", "pydantic", "yaml", "fsspec"}


def test_no_command_s_help_imports_the_training_stack() -> None:
    """`data --help` took two seconds, and so did each mistake in a job file that `data check` was given."""
    load_all = (
        "import sys, click; from loractl.scheduler.cli.main import COMMANDS, SECTIONS, cli;"
        "[cli.get_command(click.Context(cli), name) for name in COMMANDS]; print(*sys.modules)"
    )
    loaded = set(subprocess.run([sys.executable, "-c", load_all], capture_output=True, text=True).stdout.split())
    assert "loractl.worker.commands.data" in loaded
    assert not loaded & {"torch", "transformers", "peft", "datasets", "sqlalchemy", "celery"}


SCRIPT = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]["scripts"]["loractl"]


@pytest.mark.parametrize("module", ["typing", "click", "loractl.scheduler.cli.lazy", "loractl.common.errors"])
def test_a_ctrl_c_while_the_command_is_imported_ends_it_without_a_traceback(module: str) -> None:
    where, _, name = SCRIPT.partition(":")
    interrupted = f"""
import os, signal, sys

class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, AtImport())
from {where} import {name}
sys.exit({name}())
"""
    done = subprocess.run([sys.executable, "-c", interrupted, "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (ExitCode.INTERRUPTED, "", "")


def test_status_imports_neither_the_queue_nor_the_training_stack(cli: Cli) -> None:
    imported(cli, "status")  # the first call creates the database
    loaded = imported(cli, "status")
    assert "sqlalchemy" in loaded
    assert not loaded & {"celery", "kombu", "torch", "transformers", "datasets", "fsspec", "alembic", "numpy"}
    assert not loaded & {"pydantic", "redis", "yaml"}


def test_the_version_is_that_of_the_package(cli: Cli) -> None:
    assert cli("--version").stdout.strip() == f"loractl, version {__version__}"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("stauts", "did you mean loractl status?"),
        ("submitt", "did you mean loractl submit?"),
        ("xyz", "loractl --help"),
        ("show", "loractl status JOB --full has a job's history"),
        ("train", "did you mean loractl submit?"),
        ("version", "loractl --version"),
        ("sim", "in a clone, python -m benchmarks.placement replays a trace"),
    ],
)
def test_an_unknown_command_gets_a_hint_and_exit_code_2(cli: Cli, typed: str, hint: str) -> None:
    done = cli(typed, code=ExitCode.USAGE)
    assert done.stderr.startswith(f"Error: there is no command '{typed}'\nHint: {hint}")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (("status", "99"), ExitCode.NOT_FOUND, "Error: there is no job 99\nHint: loractl status -a lists all jobs\n"),
        (("cancel", "99"), ExitCode.NOT_FOUND, "Error: there is no job 99\n"),
        (("status", "--label", "x"), ExitCode.USAGE, "Error: --label x is not of the form KEY=VALUE\n"),
        (("status", "--watch"), ExitCode.USAGE, "Error: --watch without a JOB needs a terminal\n"),
        (("submit", "absent.yaml"), ExitCode.USAGE, "Error: absent.yaml: no such file\n"),
        (("status", "--colour"), ExitCode.USAGE, "Error: No such option"),
        (("submit", "--name", "x"), ExitCode.USAGE, "Error: No such option '--name'.\nHint: loractl submit --help\n"),
        (("submit", "--a.b", "8"), ExitCode.USAGE, "Error: No such option '--a.b'.\nHint: --set a.b=VALUE sets a key"),
        (("status", "--usr", "x"), ExitCode.USAGE, "Error: No such option '--usr'. Did you mean '--user'?\n"),
        (
            ("report", "1", "--html"),
            ExitCode.USAGE,
            "Error: --html needs a value\nHint: --html FILE: Write the page into",
        ),
        (("chat",), ExitCode.USAGE, "Error: Missing argument 'ADAPTER'.\nHint: loractl chat --help\n"),
        (("completion",), ExitCode.USAGE, "Error: Missing argument '{bash|zsh|fish}'. Choose from: bash, zsh, fish\n"),
        (("status", "seven"), ExitCode.NOT_FOUND, "Error: there is no job seven\n"),
    ],
)
def test_a_mistake_is_a_sentence_with_an_exit_code_and_no_traceback(
    cli: Cli, args: tuple[str, ...], code: ExitCode, sentence: str
) -> None:
    done = cli(*args, code=code)
    assert done.stderr.startswith(sentence)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_path_that_no_file_can_have_is_a_mistake_of_the_job_file(cli: Cli, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"name: x\nbase_model: /{'m' * 300}\ndataset: {{path: rows.jsonl}}\n")
    done = cli("plan", str(job), code=ExitCode.USAGE)
    assert re.match(r"Error: /m{59}\.\.\. is too long: no file has such a name\nHint: ", done.stderr)
    assert done.stderr.count("\n") == 2


def test_the_traceback_is_shown_to_those_who_ask_for_it(cli: Cli) -> None:
    done = cli("--debug", "status", "99", code=ExitCode.NOT_FOUND)
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("Error: there is no job 99\nHint: loractl status -a lists all jobs\n")


def test_a_database_that_is_away_has_an_exit_code_of_its_own(make_cli: Callable[..., Cli]) -> None:
    away = make_cli(LORACTL_DATABASE_URL="postgresql://lab:hunter2@127.0.0.1:9/loractl")
    done = away("status", code=ExitCode.UNREACHABLE)
    assert done.stderr.startswith("Error: the database is unreachable at postgresql+psycopg://lab:***@127.0.0.1:9/")
    assert "hunter2" not in done.stderr


def test_a_terminal_without_unicode_gets_the_text_all_the_same(make_cli: Callable[..., Cli]) -> None:
    ascii_only = make_cli(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    done = ascii_only("status")
    assert done.stdout.startswith("0 running, 0 waiting.")
    assert ascii_only("gpus").stdout.isascii()


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(cli: Cli) -> None:
    for args in (["--help"], ["status"]):
        command = [str(Path(sys.executable).with_name("loractl")), *args]
        process = subprocess.Popen(
            command, env=cli.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) == ExitCode.OK


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_line_is_one_that_click_answers(cli: Cli, shell: str) -> None:
    assert f"_LORACTL_COMPLETE={shell}_source loractl" in cli("completion", shell).stdout


def test_an_error_that_repeats_a_file_steers_no_terminal(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text('name: "a\\u202eb"\nbase_model: x\ndataset: {path: rows.jsonl}\n', "utf-8")

    said = cli("plan", str(file), code=2).stderr

    assert "a\N{REPLACEMENT CHARACTER}b" in said and "\u202e" not in said
