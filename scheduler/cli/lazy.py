"""A click group that loads a subcommand when it is called."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from loractl.common.errors import ExitCode, LoractlError
from loractl.common.text import slip_of

Commands = dict[str, tuple[str, str]]
"""Name -> (where it lives, its first line of help, so that a group's --help imports none of them)."""


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """A reader (head, less) that closes the pipe early is no failure; click would exit with 1."""
    try:
        yield
    except BrokenPipeError:
        # Python would complain again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(ExitCode.OK) from None


class LazyGroup(click.Group):
    """A group that imports a subcommand's module when the subcommand is used; others may be added to it as usual."""

    def __init__(
        self, *args: Any, lazy: Mapping[str, Commands], gone: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        """`lazy`: its commands by the heading under which --help lists them. `gone`: earlier commands, each with what
        took its place."""
        super().__init__(*args, **options)
        self._sections = lazy
        self._gone = gone or {}
        self._lazy = {name: one for commands in lazy.values() for name, one in commands.items()}

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _reader_may_leave():  # --help is printed here
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _reader_may_leave():
            try:
                return super().invoke(ctx)
            except click.NoSuchOption as wrong:
                options = () if wrong.ctx is None else wrong.ctx.command.params
                if "." in wrong.option_name and any("--set" in option.opts for option in options):
                    hint = f"--set {wrong.option_name.strip('-')}=VALUE sets a key of the job file"
                    raise click.UsageError(f"No such option '{wrong.option_name}'.\nHint: {hint}", wrong.ctx) from None
                near = [o for o in wrong.possibilities or () if slip_of(wrong.option_name.strip("-"), [o.strip("-")])]
                raise click.NoSuchOption(wrong.option_name, possibilities=near, ctx=wrong.ctx) from None
            except click.BadOptionUsage as wrong:
                raise self._without_value(ctx, wrong) from None

    def _without_value(self, ctx: click.Context, wrong: click.BadOptionUsage) -> click.UsageError:
        """The error with the option's own help as its hint, where the option is that of a command of this group."""
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        for option in () if command is None else command.params:
            if wrong.option_name in option.opts and (record := option.get_help_record(ctx)) is not None:
                return click.UsageError(f"{wrong.option_name} needs a value\nHint: {record[0]}: {record[1]}")
        return wrong

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self._lazy[cmd_name][0].partition(":")
        if module.startswith("loractl.worker") and importlib.util.find_spec("torch") is None:
            path = ctx.command_path if ctx.parent else "loractl"
            raise LoractlError(f"{path} {cmd_name} needs the training stack", "pip install 'loractl[worker]'")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        here = [(name, command.get_short_help_str(90)) for name, command in sorted(self.commands.items())]
        width = max(map(len, self.list_commands(ctx)))  # one for all sections, so that their texts align
        for heading, commands in self._sections.items():
            rows = [*here, *((name, text) for name, (_, text) in commands.items())]
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows])
            here = []

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            close, path = slip_of(args[0], names), ctx.command_path if ctx.parent else "loractl"
            hint = f"did you mean {path} {close}?" if close else f"{path} --help lists the commands"
            hint = self._gone.get(args[0], hint)
            raise click.UsageError(f"there is no command {args[0]!r}\nHint: {hint}", ctx=None)
        return super().resolve_command(ctx, args)
