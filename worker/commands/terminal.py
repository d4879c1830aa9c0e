"""What the commands that answer share at the terminal: their options, their notes, their safe text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from loractl.common.text import REPLACEMENT

_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that move the cursor, change the writing direction or end a line."""

_HARMLESS = "\n\t\u200c\u200d"


GPU = click.option("--gpu", metavar="CARD", help="Use this card, by index or UUID; else the freest, or the CPU.")

IN_4BIT = click.option(
    "--load-in-4bit/--no-load-in-4bit",
    default=None,
    help="The base in NF4, or not; else as most of the adapters were trained.",
)


def answering(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every answering command has."""
    options = (
        click.option("--system", metavar="TEXT", help="A system message before the conversation."),
        click.option(
            "--tools", type=click.Path(path_type=Path), metavar="FILE",
            help="A JSON list of functions that answers may call.",
        ),
        click.option(
            "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, metavar="N",
            help="The longest answer, in tokens.",
        ),
        click.option(
            "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, metavar="T",
            help="0 takes the likeliest token, as the report does.",
        ),
        click.option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, metavar="P",
            help="Draw from the likeliest tokens that make up this share.",
        ),
        click.option("--seed", type=click.IntRange(0), metavar="S", help="Draw the same answer again."),
        GPU,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def tell(text: str) -> None:
    """Print a note on stderr, next to the command's result."""
    click.echo(click.style(text, dim=True), err=True)


def loading(adapter: str) -> None:
    """Say so before torch is imported, which alone takes seconds."""
    tell(f"Loading {adapter} and its base ...")


def warn(sentence: str) -> None:
    click.echo(f"Warning: {sentence}.", err=True)


def clean_answer(text: str) -> str:
    """An answer's text without characters that steer the terminal. Line ends, all kinds of spaces and joiners stay."""
    return "".join(c if c in _HARMLESS or unicodedata.category(c) not in _STEERING else REPLACEMENT for c in text)
