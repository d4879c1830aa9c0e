"""loractl generate: an adapter's answers to single prompts."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from loractl.common.errors import UsageError

from .terminal import answering, clean_answer, tell, warn


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--base", is_flag=True, help="Let the base answer, without the adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@answering
def generate(adapter: str, prompts: tuple[str, ...], base: bool, as_json: bool, **style: Any) -> None:
    """Answer a prompt with an adapter, or with its base.

    Several prompts are answered together. Without PROMPT, or for -, it is read from standard input.
    """
    texts = [sys.stdin.read() if text == "-" else text for text in prompts or ("-",)]
    if not all(text.strip() for text in texts):
        raise UsageError("the prompt is empty", f'loractl generate {adapter} "..."')
    from loractl.common.settings import load_settings
    from loractl.worker.serving.conversation import Style, open_conversation
    from loractl.worker.serving.library import Library

    conversation = open_conversation(Library(load_settings(), warn), adapter, Style(**style), tell, warn)
    answers = conversation.complete(texts, base=base)
    if as_json:
        click.echo(json.dumps([answer.as_json() for answer in answers]))
        return
    for answer in answers:
        click.echo(clean_answer(answer.text))
