"""loractl usage and loractl quota: how much everybody has used the cards, and how much each may."""

from __future__ import annotations

import datetime as dt

import click

from loractl.common.errors import UsageError
from loractl.common.text import slip_of
from loractl.common.units import parse_date, parse_duration
from loractl.scheduler.cli.named import warn_of_unknown_user
from loractl.scheduler.cli.output import show
from loractl.scheduler.cli.screen import detect_screen
from loractl.scheduler.cli.session import open_session


@click.command()
@click.option(
    "--by", type=click.Choice(["user", "label", "card", "month"]), default="user", show_default=True,
    help="What a row stands for.",
)  # fmt: skip
@click.option(
    "--since", default="30d", show_default=True, metavar="WHEN", help="A duration, or a date like 2026-12-24."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def usage(by: str, since: str, as_csv: bool, as_json: bool) -> None:
    """Show what everybody has had of the cards.

    Hours of whole cards, of ended and of running jobs; loractl gc removes none of them. A part of a card counts as its
    GiB of the card's. LOST is the share that went into steps which no checkpoint kept; WAITED counts from when jobs
    could start. A job with two labels is in two rows, and once in the total.
    """
    from .answer import usage_table
    from .text import usage_csv, usage_text

    if as_csv and as_json:
        raise UsageError("--csv and --json are two forms of the same", "give one of them")
    _, store = open_session()
    answer = usage_table(store, by, _begin(since, store.now()))
    show(answer, as_json, lambda: usage_csv(answer) if as_csv else usage_text(answer, detect_screen()))


def _begin(text: str, now: dt.datetime) -> dt.datetime:
    """A duration before now, or a local date or time. Raises UsageError."""
    try:
        return now - dt.timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):
        pass
    try:
        return parse_date(text).astimezone(dt.UTC)
    except (ValueError, OverflowError):
        raise UsageError(f"--since {text[:40]!r} is neither a duration nor a date", "like 7d or 2026-12-24") from None


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def quota(context: click.Context, as_json: bool) -> None:
    """Limit the card hours of a user.

    Without a command, list the quotas.
    """
    if context.invoked_subcommand is not None:
        return

    from .answer import quota_list
    from .text import quotas_text

    _, store = open_session()
    answer = quota_list(store)
    show(answer, as_json, lambda: quotas_text(answer, detect_screen()))


@quota.command("set")
@click.argument("user")
@click.argument("hours", metavar="HOURS/WINDOW")
@click.option("--soft", is_flag=True, help="Beyond it the user's jobs go last; without it they wait.")
def set_quota(user: str, hours: str, soft: bool) -> None:
    """Set what USER may use, like 100h/week.

    HOURS are card hours within any day, week or month of 30 days. In a lab with roles the database's owner sets it.
    What already runs goes on.
    """
    from loractl.common.placement.shares import parse_quota, window_name

    try:
        card_hours, window_s = parse_quota(hours)
    except ValueError as error:
        raise UsageError(f"{hours[:40]!r} {error}", "like 100h/week; also /day and /month") from None
    if not user.isprintable() or not 0 < len(user) <= 255:
        raise UsageError("USER must be one line of 1 to 255 characters")
    _, store = open_session()
    warn_of_unknown_user(store, user)
    store.usage.set_quota(user, card_hours, window_s, soft=soft)
    allowed = f"{card_hours:g} card hour{'s' * (card_hours != 1)} a {window_name(window_s)}"
    click.echo(f"{user} may use {allowed}; beyond that their jobs {'go last' if soft else 'wait'}.")


@quota.command("remove")
@click.argument("user")
def remove_quota(user: str) -> None:
    """Let USER use what is free again."""
    from .answer import quota_list

    _, store = open_session()
    if not store.usage.remove_quota(user):
        close = slip_of(user, [quota.user for quota in quota_list(store).quotas])
        raise UsageError(
            f"{user[:60]!r} has no quota", f"did you mean {close}?" if close else "loractl quota lists them"
        )
    click.echo(f"{user} has no quota any more.")
