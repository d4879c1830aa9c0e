"""loractl generate and chat: one adapter's answers at the terminal, with its job's own template and base."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import LoractlError, UsageError

if TYPE_CHECKING:
    from loractl.worker.serving.adapter_pool import Resident
    from loractl.worker.serving.decoding import Ask, Engine, Said
    from loractl.worker.serving.library import Library, Listed

COMMANDS = {
    "/adapter NAME": "go on with another adapter of the same base; the conversation stays",
    "/base": "let the base alone answer the last question, to compare",
    "/system TEXT": "begin anew with a system message",
    "/reset": "begin anew",
    "/quit": "end; Ctrl-D does the same, Ctrl-C stops an answer",
}


_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of what moves the cursor, turns the writing or ends a line."""

_HARMLESS = "\n\t\u200c\u200d"


def answering(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every answering command has."""
    options = (
        click.option("--system", metavar="TEXT", help="A system message before the conversation."),
        click.option(
            "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, metavar="N",
            help="An answer ends there at the latest.",
        ),
        click.option(
            "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, metavar="T",
            help="0 takes the likeliest token, as the report does.",
        ),
        click.option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, metavar="P",
            help="Draw among the likeliest tokens that make up this share.",
        ),
        click.option("--seed", type=click.IntRange(0), metavar="S", help="Draw the same answer again."),
        click.option("--gpu", metavar="CARD", help="Use this card, by index or UUID; else the first, or the CPU."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class Style:
    """How answers are drawn."""

    system: str | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    gpu: str | None


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
    talk = _open(adapter, Style(**style))
    answers = talk.answers([talk.question(text) for text in texts], base=base)
    if as_json:
        name = None if base else talk.adapter.job_id
        rows = [
            {"prompt": t, "answer": a.text, "ended": a.ended, "tokens": a.tokens}
            for t, a in zip(texts, answers, strict=True)
        ]
        click.echo(json.dumps([{"job_id": name, **row} for row in rows]))
        return
    for answer in answers:
        click.echo(_safe(answer.text))


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@answering
def chat(adapter: str, **style: Any) -> None:
    """Talk with an adapter; /adapter switches to another one in place.

    /base lets the base answer the last question, /help lists the rest.
    """
    talk = _open(adapter, Style(**style))
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history for input()
        click.echo(click.style("/help lists what else can be typed.", dim=True), err=True)
    for line in _lines():
        try:
            if line.startswith("/"):
                if not talk.obey(line):
                    return
            else:
                talk.turn(line)
        except LoractlError as error:
            click.echo(f"Error: {error.sentence}", err=True)
            if error.hint:
                click.echo(f"Hint: {error.hint}", err=True)


def _lines() -> Iterator[str]:
    """What the person types, empty lines left out, until they end it."""
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


@dataclass(kw_only=True)
class Answer:
    """What was answered so far."""

    text: str = ""
    tokens: int = 0
    ended: str | None = None
    error: str | None = None

    def take(self, said: Said) -> None:
        self.text += said.text
        self.tokens, self.ended, self.error = said.tokens, said.ended, said.error


@dataclass(kw_only=True)
class Talk:
    """A conversation with an adapter on a loaded base."""

    library: Library
    resident: Resident
    engine: Engine
    adapter: Listed
    style: Style
    messages: list[dict[str, str]] = field(default_factory=list)

    def question(self, text: str) -> list[dict[str, str]]:
        """The messages of a first question."""
        return [*self._opening(), {"role": "user", "content": text}]

    def answers(self, questions: Sequence[Sequence[dict[str, str]]], *, base: bool) -> list[Answer]:
        """All of them at once. Raises LoractlError when one fails."""
        found = [Answer() for _ in questions]
        for messages, answer in zip(questions, found, strict=True):
            self.engine.ask(self._ask(messages, answer.take, base=base))
        self.engine.finish()
        if failed := next((answer.error for answer in found if answer.error), None):
            raise LoractlError(f"no answer: {failed}")
        return found

    def turn(self, text: str) -> None:
        """One question, answered as it comes; a stopped answer stays in the conversation as far as it came."""
        messages = [*(self.messages or self._opening()), {"role": "user", "content": text}]
        answer = self._spoken(messages, base=False)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]

    def obey(self, line: str) -> bool:
        """A command; False to end. Raises UsageError."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/adapter":
            self._switch(rest.strip())
        elif word == "/base":
            self._ask_base()
        elif word in ("/reset", "/system"):
            self.messages = [{"role": "system", "content": rest.strip()}] if word == "/system" and rest.strip() else []
            click.echo(click.style("A new conversation.", dim=True), err=True)
        elif word == "/help":
            for name, what in COMMANDS.items():
                click.echo(f"{name:<15} {what}", err=True)
        else:
            raise UsageError(f"there is no command {word}", "/help lists them")
        return True

    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.style.system}] if self.style.system else []

    def _switch(self, name: str) -> None:
        from loractl.worker.serving.library import same_base

        if not name:
            raise UsageError("/adapter needs a name", "like /adapter support:prod")
        other = self.library.find(name)
        same_base([self.adapter, other])
        began = time.monotonic()
        folder = self.library.fetch(other)
        held = self.resident.hold(other, folder)
        self.resident.switch(held.key)
        self.resident.let_go(held)
        self.adapter = other
        took = time.monotonic() - began
        click.echo(
            click.style(f"{other.name} (job {other.job_id}) answers now, after {took:.2f} s.", dim=True), err=True
        )

    def _ask_base(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("there is no question yet", "ask one first")
        self._spoken(self.messages[:-1], base=True)

    def _spoken(self, messages: Sequence[dict[str, str]], *, base: bool) -> Answer:
        """Answer at the terminal, token by token. Ctrl-C stops the answer."""
        answer = Answer()

        def say(said: Said) -> None:
            answer.take(said)
            click.echo(_safe(said.text), nl=False)

        ask = self._ask(messages, say, base=base)
        self.engine.ask(ask)
        # not by KeyboardInterrupt, which would leave a load or a batch half-way
        before = signal.signal(signal.SIGINT, lambda *_: ask.cancelled.set())
        try:
            self.engine.finish()
        finally:
            signal.signal(signal.SIGINT, before)
        click.echo("")
        if answer.error:
            raise LoractlError(f"no answer: {answer.error}")
        if answer.ended == "length":
            click.echo(click.style(f"(cut at {answer.tokens} tokens: --max-new-tokens)", dim=True), err=True)
        return answer

    def _ask(self, messages: Sequence[dict[str, str]], say: Callable[[Said], None], *, base: bool) -> Ask:
        from loractl.worker.data.prompt import prompt_for
        from loractl.worker.serving.decoding import Ask

        style = self.style
        ids = prompt_for(self.library.format(self.adapter), messages, self.resident.tokenizer)
        return Ask(
            prompt=ids,
            say=say,
            max_new_tokens=min(style.max_new_tokens, self.engine.room(len(ids))),
            adapter=None if base else self.adapter,
            folder=None if base else self.library.fetch(self.adapter),
            temperature=style.temperature,
            top_p=style.top_p,
            seed=style.seed,
        )


def _open(name: str, style: Style) -> Talk:
    """Load the base of an adapter as its job did: in NF4 for one of QLoRA."""
    from loractl.common.settings import load_settings
    from loractl.worker.serving.decoding import Engine
    from loractl.worker.serving.library import Library

    library = Library(load_settings())
    adapter = library.find(name)
    resident = load_for(library, adapter, style.gpu)
    return Talk(library=library, resident=resident, engine=Engine(resident), adapter=adapter, style=style)


def load_for(library: Library, adapter: Listed, gpu: str | None, dtype: str | None = None) -> Resident:
    """The base of an adapter, on a card of this box or its processor, in the number format that it was trained with."""
    from loractl.worker.serving.adapter_pool import Base, open_resident

    device, trained = take_device(library, gpu), adapter.spec.training.dtype
    base = Base(
        model=adapter.spec.base_model,
        revision=library.revision(adapter),
        method=adapter.method,
        device=device,
        dtype=dtype or ("auto" if trained == "float16" and device == "cpu" else trained),
        run_code=library.may_run_code(adapter),
    )
    resident = open_resident(base, tell=lambda text: click.echo(click.style(text, dim=True), err=True))
    warn_of_other_base(library, [adapter])
    return resident


def warn_of_other_base(library: Library, adapters: Sequence[Listed]) -> None:
    """Say where the base on this box is not the one that an adapter was trained on."""
    for adapter in adapters:
        if changed := library.changed_base(adapter):
            what = f"{adapter.name} (job {adapter.job_id}) was trained on other files of its base: {', '.join(changed)}"
            click.echo(f"Warning: {what}.", err=True)


def take_device(library: Library, gpu: str | None) -> str:
    """cuda or cpu; this process sees no other card from here on."""
    from loractl.worker.base.quiet import quieten
    from loractl.worker.device.devices import find_devices

    quieten()
    device = find_devices(library.settings, gpu)[0]
    os.environ.update(device.environment())
    return device.trains_on


def _safe(text: str) -> str:
    """An answer's text without what would steer the terminal; lines, spaces of all kinds and joiners stay."""
    return "".join(c if c in _HARMLESS or unicodedata.category(c) not in _STEERING else "�" for c in text)
