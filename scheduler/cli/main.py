"""The `loractl` command: its subcommands load when they are called, and every error becomes a sentence and a code."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import sys
from typing import NoReturn

import click

from loractl import __version__
from loractl.common.errors import ExitCode, LoractlError, SpecError, UsageError
from loractl.common.text import clean_text, without_passwords

from .lazy import Commands, LazyGroup

SECTIONS: dict[str, Commands] = {
    "Jobs": {
        "submit": ("loractl.scheduler.submit.command:submit", "Queue the jobs of one or more job files."),
        "sweep": (
            "loractl.scheduler.sweep.command:sweep",
            "Try several settings of a job file; losers may stop early.",
        ),
        "status": (
            "loractl.scheduler.status.command:status",
            "List running and waiting jobs, or show one job.",
        ),
        "logs": ("loractl.scheduler.status.command:logs", "Print a job's log."),
        "why": ("loractl.scheduler.why.command:why", "Explain why a job waits, card by card, and when it will start."),
        "plan": (
            "loractl.scheduler.plan.command:plan",
            "Predict the memory that a job needs, part by part, and how long it takes.",
        ),
        "edit": ("loractl.scheduler.change.command:edit", "Change the settings of a waiting or running job."),
        "hold": ("loractl.scheduler.change.command:hold", "Keep waiting jobs from starting until loractl release."),
        "release": ("loractl.scheduler.change.command:release", "Let held jobs start."),
        "retry": ("loractl.scheduler.change.command:retry", "Queue failed or cancelled jobs again."),
        "cancel": ("loractl.scheduler.change.command:cancel", "Cancel waiting or running jobs."),
        "data": ("loractl.worker.commands.data:data", "Check a job's data, and show it as the trainer sees it."),
        "import": (
            "loractl.scheduler.foreign.command:import_config",
            "Turn an Axolotl or LLaMA-Factory YAML into a job file.",
        ),
    },
    "Results": {
        "report": ("loractl.scheduler.report.command:report", "Print a job's evaluation report: base against tuned."),
        "compare": (
            "loractl.scheduler.compare.command:compare",
            "Compare finished jobs: losses, memory, time, and their settings.",
        ),
        "reproduce": (
            "loractl.scheduler.reproduce.command:reproduce",
            "Run a finished job again, and check that the result is the same.",
        ),
        "adapters": (
            "loractl.scheduler.adapters.command:adapters",
            "Manage stored adapters: list, tag, pull, push, merge, delete.",
        ),
    },
    "Ask an adapter": {
        "generate": ("loractl.worker.commands.chat:generate", "Answer a prompt with an adapter, or with its base."),
        "chat": (
            "loractl.worker.commands.chat:chat",
            "Talk with an adapter; /adapter switches to another one in place.",
        ),
        "predict": ("loractl.worker.commands.predict:predict", "Label or answer every row of a file, as JSON lines."),
        "matrix": (
            "loractl.worker.commands.matrix:matrix",
            "Score several adapters on several tasks, on one loaded base.",
        ),
        "serve": (
            "loractl.worker.commands.serve:serve",
            "Serve a base and its adapters over an OpenAI-compatible API.",
        ),
    },
    "The lab": {
        "worker": (
            "loractl.worker.commands.worker:worker",
            "Serve this box's devices: claim waiting jobs that fit and train them.",
        ),
        "gpus": ("loractl.scheduler.fleet.command:gpus", "List the devices of all boxes and what uses them."),
        "drain": ("loractl.scheduler.fleet.command:drain", "Keep new jobs from a box or a card, with a reason."),
        "undrain": ("loractl.scheduler.fleet.command:undrain", "Allow new jobs on a drained box or card again."),
        "usage": ("loractl.scheduler.usage.command:usage", "Show what everybody has had of the cards."),
        "quota": ("loractl.scheduler.usage.command:quota", "Limit the card hours of a user."),
        "web": ("loractl.scheduler.web.command:web", "Show the lab in a browser, and its metrics to Prometheus."),
        "lab": ("loractl.scheduler.lab.command:lab", "Set up a lab on this server box, and invite boxes and people."),
        "join": ("loractl.scheduler.lab.command:join", "Join a lab with the line that its server box has printed."),
        "db": ("loractl.scheduler.database.command:db", "Manage the database."),
        "gc": ("loractl.scheduler.garbage.command:gc", "Remove stored files and rows that nobody needs."),
    },
    "This installation": {
        "doctor": ("loractl.scheduler.lab.command:doctor", "Check this installation, and say what to fix."),
        "completion": ("loractl.scheduler.cli.named:completion", "Print the line that turns on shell completion."),
    },
}
"""As `loractl --help` lists them."""

COMMANDS: Commands = {name: one for commands in SECTIONS.values() for name, one in commands.items()}


GONE = {
    "show": "loractl status JOB --full has a job's history, attempts and settings, and status JOB --json all of it",
    "sim": "in a clone, python -m benchmarks.placement replays a trace, or with --lab the lab's own jobs; "
    "python -m benchmarks.baselines compares our rule with others on a fleet of your choice",
    **dict.fromkeys(("run", "train", "start", "queue"), "did you mean loractl submit?"),
    **dict.fromkeys(("list", "ls", "jobs", "ps"), "did you mean loractl status?"),
    **dict.fromkeys(("stop", "kill", "delete", "rm"), "did you mean loractl cancel?"),
    "help": "loractl --help, or loractl COMMAND --help",
    "version": "loractl --version",
}
"""What took the place of commands of earlier versions, and what is meant by words that other tools have."""


@click.group(
    cls=LazyGroup,
    lazy=SECTIONS,
    gone=GONE,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="loractl")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Queue LoRA and QLoRA fine-tunes on a lab's GPU boxes.

    Write a job file, then:  loractl submit job.yaml;  loractl worker (on each box);  loractl status
    """


def main() -> NoReturn:
    """The console script: exit codes are those of loractl.common.errors.ExitCode."""
    # importing makes many objects and no garbage: to look for some costs an eighth of a command's time
    gc.set_threshold(250_000)  # status makes 131,000 objects, a submit 185,000
    atexit.register(gc.freeze)  # at exit Python looks for garbage in all of them: a quarter of submit's time
    debug = "--debug" in sys.argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a dash that the terminal's encoding lacks must not end a command
    try:
        sys.exit(cli.main(standalone_mode=False) or ExitCode.OK)
    except LoractlError as error:
        if debug:
            sys.excepthook(type(error), error, error.__traceback__)
        _print_error(error)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(ExitCode.INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as bare:
        click.echo(bare.format_message())  # a group without a subcommand: its help is the answer
        sys.exit(ExitCode.USAGE)
    except click.ClickException as wrong:
        said = wrong.format_message().replace("\n\t", " ")  # click puts each choice on a separate line
        context = None if "\nHint: " in said else getattr(wrong, "ctx", None)
        _print_sentences(said, None if context is None else f"{context.command_path} --help")
        sys.exit(ExitCode.USAGE)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        sys.exit(_unexpected(error))


def _unexpected(error: Exception) -> ExitCode:
    """An unexpected error is still one sentence. A database lost during the command is named."""
    from loractl.common.settings import load_settings
    from loractl.common.store.database import outage, unreachable

    if (why := outage(error)) is not None:
        known = unreachable(load_settings(), why)
        _print_error(known)
        return known.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        _print_error(UsageError(f"{error.filename!s:.60}... is too long: no file has such a name", "check that path"))
        return ExitCode.USAGE
    _print_sentences(f"{type(error).__name__}: {error}", "this is a fault of loractl; loractl --debug ... shows where")
    return ExitCode.FAILED


def _print_error(error: LoractlError) -> None:
    if isinstance(error, SpecError):
        for problem in error.problems:
            _print_sentences(str(problem), problem.hint)
        return
    _print_sentences(error.sentence, error.hint)


def _print_sentences(sentence: str, hint: str | None) -> None:
    lines = [f"Error: {sentence}", *([f"Hint: {hint}"] if hint else [])]
    click.echo(clean_text(without_passwords("\n".join(lines))), err=True)  # a sentence may repeat what a file holds
