"""loractl chat and loractl generate: an adapter's answers in the terminal, in a conversation or to single prompts."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import LoractlError, UsageError

from .terminal import answering, clean_answer, loading, tell, warn

if TYPE_CHECKING:
    from loractl.worker.serving.conversation import Conversation, PartialAnswer


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--base", is_flag=True, help="Let the base answer, without the adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@answering
def generate(adapter: str, prompts: tuple[str, ...], base: bool, as_json: bool, **style: Any) -> None:
    """Answer a prompt with an adapter, or with its base.

    Several prompts are answered together. Without PROMPT, or if it is -, the prompt is read from standard input.
    """
    texts = [sys.stdin.read() if text == "-" else text for text in prompts or ("-",)]
    if not all(text.strip() for text in texts):
        raise UsageError("the prompt is empty", f'loractl generate {adapter} "..."')
    from loractl.common.progress import working

    conversation = _opened(adapter, style)
    with working("Answers", len(texts)) as report:
        answers = conversation.complete(texts, base=base, ended=report)
    if as_json:
        click.echo(json.dumps([answer.as_json() for answer in answers]))
        return
    for answer in answers:
        click.echo(clean_answer(answer.text))


def _opened(adapter: str, style: Mapping[str, Any]) -> Conversation:
    from loractl.common.settings import load_settings
    from loractl.worker.serving.library import Library

    library = Library(load_settings(), warn)
    library.find(adapter)  # refused before anything is loaded
    loading(adapter)
    from loractl.worker.serving.conversation import Style, open_conversation

    return open_conversation(library, adapter, Style(**style), tell, warn)


COMMANDS = {
    "/adapter NAME": "continue the conversation with another adapter of the same base",
    "/base": "let the base alone answer the last question, to compare",
    "/system TEXT": "start over with a system message",
    "/reset": "start over",
    "/quit": "end; Ctrl-D does the same, Ctrl-C stops an answer",
}


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@answering
def chat(adapter: str, **style: Any) -> None:
    """Talk with an adapter; /adapter switches to another one in place.

    /base lets the base answer the last question, /help lists the rest.
    """
    conversation = _opened(adapter, style)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history for input()
        tell("/help lists the commands.")
    for line in _lines():
        try:
            if line.startswith("/"):
                if not _obey(conversation, line):
                    return
            else:
                _end_line(conversation.turn(line, _say))
        except LoractlError as error:
            click.echo(f"Error: {error.sentence}", err=True)
            if error.hint:
                click.echo(f"Hint: {error.hint}", err=True)


def _lines() -> Iterator[str]:
    """The lines that the person types, without empty ones, until they quit."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo("", err=True)
            return
        if line:
            yield line


def _obey(conversation: Conversation, line: str) -> bool:
    """Do what a command says; False to quit. Raises UsageError."""
    word, _, rest = line.partition(" ")
    if word == "/quit":
        return False
    if word == "/adapter":
        _switch(conversation, rest.strip())
    elif word == "/base":
        _end_line(conversation.turn_of_base(_say))
    elif word in ("/reset", "/system"):
        conversation.begin_anew(rest.strip() if word == "/system" else "")
        tell("A new conversation.")
    elif word == "/help":
        for name, what in COMMANDS.items():
            click.echo(f"{name:<15} {what}", err=True)
    else:
        raise UsageError(f"there is no command {word}", "/help lists them")
    return True


def _switch(conversation: Conversation, name: str) -> None:
    if not name:
        raise UsageError("/adapter needs a name", "like /adapter support:prod")
    took = conversation.switch(name)
    adapter = conversation.adapter
    tell(f"{adapter.name} (job {adapter.job_id}) answers now, after {took:.2f} s.")
    from loractl.worker.serving.adapter_pool import warn_of_arithmetic

    warn_of_arithmetic(conversation.pool, [adapter], warn)


def _say(text: str) -> None:
    click.echo(clean_answer(text), nl=False)


def _end_line(answer: PartialAnswer) -> None:
    """End the answer's line after its last token. Raises LoractlError if the answer failed."""
    click.echo("")
    answer.check()
    if answer.ended == "length":
        tell(f"(cut at {answer.tokens} tokens: --max-new-tokens)")
