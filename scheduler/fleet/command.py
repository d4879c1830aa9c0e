"""loractl gpus, and loractl drain and undrain, which close a box or a card for new jobs and open it again."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from loractl.common.errors import UsageError
from loractl.common.units import parse_moment
from loractl.scheduler.cli.named import completed
from loractl.scheduler.cli.output import show
from loractl.scheduler.cli.screen import detect_screen
from loractl.scheduler.cli.session import open_session

if TYPE_CHECKING:
    from loractl.common.store.store import Store


class Target(click.types.StringParamType):
    """An argument that names a box or a card."""

    name = "target"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Boxes and their cards."""
        return completed(incomplete, _known_targets)


def _known_targets(store: Store) -> Iterator[tuple[str, str]]:
    from .answer import fleet

    for target in sorted(fleet(store).targets):
        yield target, "a card" if ":" in target else "a box"


@click.command()
@click.argument("target", type=Target(), metavar="HOST|CARD")
@click.option("--reason", required=True, help="The reason, shown to people whose jobs wait.")
@click.option("--until", metavar="WHEN", help="End it after a duration like 2d, or at 18:00, 2026-12-24 or ...T18:00.")
@click.option("--now", "at_once", is_flag=True, help="Also requeue running jobs after a checkpoint.")
def drain(target: str, reason: str, until: str | None, at_once: bool) -> None:
    """Keep new jobs from a box or a card, with a reason.

    HOST is a box like heron, CARD one of its cards like heron:2. Running jobs end first, unless --now.
    """
    from .answer import fleet

    settings, store = open_session()
    known = fleet(store)
    if target not in known.targets:
        names = f"known: {', '.join(sorted(known.targets))}" if known.targets else None
        hint = names or "none is known: start one on the box: loractl worker"
        raise UsageError(f"no worker has reported {target}", hint)
    if not reason.strip() or not reason.isprintable() or len(reason) > 200:
        raise UsageError("--reason must be one line of 1 to 200 characters")
    end = None if until is None else end_of_drain(until, known.now)
    store.cards.drain(target, settings.user, reason.strip(), until=end, at_once=at_once)
    left = _left(fleet(store).jobs_on(target), at_once)
    click.echo(f"{target} takes no more jobs{left}. End it: loractl undrain {target}")


@click.command()
@click.argument("target", type=Target(), metavar="HOST|CARD")
def undrain(target: str) -> None:
    """Allow new jobs on a drained box or card again."""
    _, store = open_session()
    if not store.cards.end_drain(target):
        drained = sorted(store.cards.drains())
        raise UsageError(f"{target} is not drained", f"drained: {', '.join(drained)}" if drained else None)
    click.echo(f"{target} takes jobs again.")


def _left(running: Sequence[int], at_once: bool) -> str:
    """What happens to the jobs that run there."""
    if not running:
        return ""
    if len(running) == 1:
        return f"; job {running[0]} {'is requeued after a checkpoint' if at_once else 'runs to its end'}"
    what = "are requeued after a checkpoint" if at_once else "run to their ends"
    return f"; jobs {', '.join(map(str, running))} {what}"


def end_of_drain(text: str, now: dt.datetime) -> dt.datetime:
    """A duration from now, or a local date or time. Raises UsageError."""
    try:
        return parse_moment(text, now)
    except ValueError as error:
        raise UsageError(f"--until: {text!r} {error}", "like 2d, 18:00, 2026-12-24 or 2026-12-24T18:00") from None


@click.command()
@click.option("--used", is_flag=True, help="Show what jobs hold now, next to what their plans reserve.")
@click.option("--forget", type=Target(), metavar="HOST|CARD", help="Remove a silent box or card from the list.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gpus(used: bool, forget: str | None, as_json: bool) -> None:
    """List the devices of all boxes and what uses them.

    FREE is what a new job may take: the memory less what the owner keeps, what other people's programs hold or held a
    short while ago, and what jobs reserve.
    """
    from .answer import fleet
    from .text import devices

    _, store = open_session()
    if forget is not None:
        click.echo(f"Forgotten: {', '.join(store.cards.forget_silent(forget))}.", err=True)
    answer = fleet(store)
    show(answer, as_json, lambda: devices(answer, detect_screen(), used=used))
