"""A job's wait on a terminal: the reason in a sentence, every card, what goes first, what would help."""

from __future__ import annotations

from loractl.common.job.status import Status
from loractl.common.text import clean_line, in_words, numbers, when_they_end
from loractl.common.units import GIB, clock, duration, gib
from loractl.scheduler.cli.screen import Screen, card_name, joined, wrapped, wrapped_table
from loractl.scheduler.wait.reasons import Tier

from .answer import Ahead, NotWaiting, Why


def why_text(answer: Why | NotWaiting, screen: Screen) -> str:
    """Why a job waits, or a sentence that it does not."""
    if isinstance(answer, NotWaiting):
        job = answer.job
        trouble = f", its card is {answer.trouble}" if answer.trouble else ""
        place = clean_line(f" on {job.where}{trouble}" if job.status is Status.RUNNING else f": {job.message}")
        return f"Job {job.job_id} does not wait: it {job.status.in_words}{place}. More: loractl status {job.job_id}"
    job, wait = answer.job, answer.wait
    lines = wrapped(f"{job.job_id} {job.name} waits for {_asked(answer)}.", f"{job.job_id} {job.name}", screen)
    lines += wrapped(f"Reason: {wait.word}, {wait.sentence}.", wait.word, screen)
    lines += wrapped(f"{job.gave_way}.", "", screen) if job.gave_way else []
    lines += _start(answer, screen)
    if answer.cards:
        lines += ["", *_cards(answer, screen)]
    ahead = [] if wait.tier is Tier.NEVER or answer.ahead is None else [_ahead(answer.ahead)]
    helps = [f"{wait.helps}{': ' if wait.command else '.'}{wait.command}"] if wait.helps else []
    lines += [""] if ahead or helps else []
    for text in (*ahead, *helps):
        lines += wrapped(text, "", screen)
    return joined(lines, screen)


def _asked(answer: Why) -> str:
    size, cards = answer.job.vram_needed, 1
    if answer.asks is not None:
        size, cards = answer.asks.bytes, answer.asks.cards
    if cards > 1:
        return f"{cards} cards of one box" if size is None else f"{gib(size)} GiB on each of {cards} cards of one box"
    return "a card of its own" if size is None else f"{gib(size)} GiB on one card"


def _start(answer: Why, screen: Screen) -> list[str]:
    start = answer.start
    if start is not None and start.at > answer.now:
        spread = f" ± {duration(start.spread_s)}" if start.spread_s >= 1 else ""
        at, rests = clock(start.at, answer.now), []
        if measured := start.measured:
            rests.append(f"{when_they_end(measured)} as {'its' if len(measured) == 1 else 'their'} steps say")
        if predicted := start.predicted:
            rests.append(f"{numbers(predicted)} {'takes' if len(predicted) == 1 else 'take'} as long as predicted")
        rested = f", if {' and '.join(rests)}" if rests else ""
        return wrapped(f"Expected start: {at}{spread} on {in_words(start.nodes)}{rested}.", at, screen)
    return wrapped(f"Expected start: not known: {answer.unknown}.", "", screen) if answer.unknown else []


def _cards(answer: Why, screen: Screen) -> list[str]:
    """A row per card; those on which the job is expected to start are marked."""
    free = [card.node for card in answer.cards if card.when == "now"]
    wanted = 1 if answer.asks is None else answer.asks.cards
    best = answer.start.nodes if answer.start is not None else free[:1] if wanted == 1 else ()
    arrow = "→" if screen.unicode else ">"
    rows = [
        [
            f"{arrow if card.node in best else ' '} {card_name(card.node)}",
            gib(card.free),
            f"{card.total / GIB:.0f}",
            card.when,
            card.then,
        ]
        for card in answer.cards
    ]
    colors = ["green" if card.node in best else "" for card in answer.cards]
    return wrapped_table(["  CARD", "FREE", "OF", "FREE AT", "THEN"], rows, colors, screen, right=("FREE", "OF"))


def _ahead(ahead: Ahead) -> str:
    if not ahead.jobs:
        return "Nothing is ahead of it." if ahead.complete else "Too many jobs wait to say which are ahead of it."
    named = ", ".join(f"{job_id} ({user})" for job_id, user in ahead.jobs[:3])
    more = f" and {'' if ahead.complete else 'at least '}{len(ahead.jobs) - 3} more" if ahead.jobs[3:] else ""
    return f"Ahead of it: {named}{more}."
