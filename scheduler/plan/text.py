"""A plan on a terminal: the parts of its memory as bars, the cards that hold the job, how long it takes there, and how
accurate plans were."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loractl.common.units import duration, gib
from loractl.scheduler.cli.screen import (
    ROOM_TO_WRAP,
    Screen,
    bar,
    card_name,
    fit,
    joined,
    table,
    wrapped,
    wrapped_table,
)

if TYPE_CHECKING:
    from loractl.common.memory.fit import Fit
    from loractl.common.memory.plan import Plan

    from .answer import CardTime, LargestFit, MemoryNeed, PlanAccuracy

_COLORS = {"fits": "green", "tight": "yellow"}


def need_text(need: MemoryNeed, next_command: str, screen: Screen) -> str:
    """Both methods' parts as bars, which cards hold the job, and what else would fit."""
    lines: list[str] = []
    longest = max(size for plan in need.plans.values() for size in (*plan.parts.values(), plan.margin_bytes))
    for method, plan in need.plans.items():
        like = _like_it(need.measured) if method is need.choice or len(need.plans) == 1 else ""
        size = f"{gib(plan.need_bytes)} GiB"
        head = wrapped(f"{need.title} with {method.value} needs {size}{like}", size, screen)
        lines += [*([""] if lines else []), *head, ""]
        lines += _parts(plan, longest, screen)
    lines += ["", *map(screen.dim, wrapped(need.planned_for, "", screen))]
    lines += [line for one in need.times for line in wrapped(_time(one), "", screen)]
    lines += [line for text in (*_until_it_runs(need), *_in_its_room(need)) for line in wrapped(text, "", screen)]
    if need.patience_s:
        patient = f"For {duration(need.patience_s)} it waits for a card that holds LoRA; then QLoRA is allowed."
        lines += wrapped(patient, "", screen)
    if not need.on_gpu:
        about = "Planned for a processor, since no GPU is known: what the whole process holds of the box's RAM."
        lines += map(screen.dim, wrapped(about, "", screen))
    if need.cards:
        rows = [
            [screen.style(f"{c.word:<7}", fg=_COLORS.get(c.word)), card_name(c.card), c.total_gib, c.how]
            for c in need.cards
        ]
        lines += ["", *wrapped_table(["", "CARD", "OF", ""], rows, [""] * len(rows), screen, right=("OF",))]
    if need.largest is not None:
        lines += ["", *(line for text in _solved(need.largest) for line in wrapped(text, "", screen))]
    if need.solutions and need.largest is not None:
        lines += ["", *_solutions(need, screen)]
    return joined([*lines, "", screen.dim(next_command)], screen)


def _solutions(need: MemoryNeed, screen: Screen) -> list[str]:
    """What holds the job if the cards do not hold it as it is, each with its settings below."""
    none = "No box holds it on the cards that it asks for" if need.one_holds else "No card holds it alone as it is"
    lines = [f"{none}. What would:"]
    for one in need.solutions:
        each = " of each" if one.cards > 1 else ""
        asis = "" if one.settings else ", as it is"
        text = f"{one.words}{asis}: {gib(one.bytes)} GiB{each} with {one.method.value}"
        lines += textwrap.wrap(text, screen.width, initial_indent="  ", subsequent_indent="  ")
        settings = " ".join(f"--set\0{setting}" for setting in one.settings)  # no line break between --set and its key
        lines += [f"    {line}".replace("\0", " ") for line in textwrap.wrap(settings, screen.width - 4, **_WHOLE)]
    return lines


_WHOLE: Any = {"break_on_hyphens": False, "break_long_words": False}


def _until_it_runs(need: MemoryNeed) -> list[str]:
    """What the job waits for, if that is not what its rows need."""
    first = need.submitted
    method = None if first is None else need.choice or next(iter(need.plans))
    if first is None or method is None or (size := first.need.of(method)) is None:
        return []
    if gib(size) == gib(need.reserved.of(method)) and first.choice is need.choice:
        return []
    asks = [f"{gib(size)} GiB with {method.value}"] if first.ways.alone else []
    if (box := first.box) is not None:
        asks.append(f"{gib(box.size)} GiB of each of {box.way.cards} cards with {box.method.value}")
    elif not asks and (ways := first.ways.gangs):
        asks.append(f"{gib(ways[0].need.of(method))} GiB of each of {ways[0].cards} cards with {method.value}")
    if not asks:
        return []
    where = ""
    if need.cards and first.choice is not need.choice and box is None:
        none = f", which no {'card' if first.ways.alone else 'box'} has"
        where = none if first.choice is None else f", so it would use {first.choice.value}"
    waits = f"waits for {', or for '.join(asks)}{where}."
    if first.begun:
        return [f"It {waits}"]
    text = f"submit reserves for rows of max_length: until its trainer has counted them, it {waits}"
    if first.longest is not None and first.longest < first.max_length:
        text += f" With --set dataset.max_length={first.longest} it waits for rows of that length."
    return [text]


def _in_its_room(need: MemoryNeed) -> list[str]:
    """What the job may get beyond its need, and when."""
    method = need.choice or next(iter(need.plans))
    whole, *pieces = need.roomy.of(method) or (None,)
    if whole is None:
        return []
    sizes = [f"{gib(whole.bytes)} GiB"]
    sizes += [
        f"{gib(one.bytes)} with {one.micro_batch} row{'s' * (one.micro_batch > 1)} at once"
        f"{' and every second block recomputed' if one.half else ''}"
        for one in pieces
    ]
    when = "it has that room where it is alone on a card and no ready job wants it"
    return [f"Without recomputing it takes {', '.join(sizes)} ({method.value}): {when}."]


def _time(told: CardTime) -> str:
    """How long it takes on a model of card, what that rests on, and how far off such predictions were."""
    found, name = told.forecast, told.device_name
    if not found.is_known:
        return f"How long it takes on {name} is {found.basis.in_words}. It counts as {duration(found.seconds)}."
    step = "" if found.step_s is None else f"{_step(found.step_s)} a step, "
    rests = f"{step}{found.basis.in_words}: {found.count} attempt{'s' * (found.count != 1)}"
    judged = "no such prediction was tried yet"
    if told.accuracy is not None:
        times = f"{told.accuracy.count} attempt{'s' * (told.accuracy.count != 1)}"
        judged = f"such predictions were off by x{told.accuracy.off:.1f} at the median of {times}"
    return f"It takes about {duration(found.seconds)} on {name} with {told.method.value} ({rests}; {judged})."


def _step(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _like_it(measured: Sequence[int]) -> str:
    if not measured:
        return ""
    return f" (measured on {len(measured)} like it: {gib(min(measured))} to {gib(max(measured))})"


def _parts(plan: Plan, longest: int, screen: Screen) -> list[str]:
    """A bar for each part; `longest` bytes fill it, in every plan on the screen."""
    width = 12 if screen.width < 110 else 30
    parts = {**plan.parts, "margin": plan.margin_bytes}
    names = max(len(name.replace("_", " ")) for name in parts)
    lines = []
    for name, size in parts.items():
        if not size:
            continue
        drawn = bar(size / longest, width, screen).rstrip("·.")
        note = plan.notes.get(name, "")
        line = f"  {name.replace('_', ' '):<{names}}  {gib(size):>6}  {drawn:<{width}}  "
        lines += _beside(line, note, screen)
    return lines


def _beside(line: str, note: str, screen: Screen) -> list[str]:
    """The line with a note that wraps below its own beginning, or below the line if that is too narrow to read."""
    room = screen.width - len(line)
    if room < ROOM_TO_WRAP:
        below = textwrap.wrap(note, screen.width, initial_indent=" " * 4, subsequent_indent=" " * 4)
        return [line.rstrip(), *below] if len(note) > room else [f"{line}{note}".rstrip()]
    first, *rest = textwrap.wrap(note, room, break_on_hyphens=False) or [""]
    return [f"{line}{first}".rstrip(), *(" " * len(line) + one for one in rest)]


def _solved(largest: LargestFit) -> list[str]:
    return [
        f"Largest in {gib(largest.room)} GiB, {largest.which}:",
        *(f"  {method.value:<5}  {_forms(size)}" for method, size in largest.by_method.items()),
    ]


def _forms(size: Fit) -> str:
    """The two ways to fit, each with the other key unchanged."""
    ways = []
    if size.micro_batch:
        limit = " (every row to train on; memory is not the limit)" if size.all_rows else ""
        ways.append(f"per_device_train_batch_size {size.micro_batch}{limit}")
    if size.max_length:
        ways.append(f"max_length {size.max_length}")
    if not ways:
        return "nothing fits, not even with one row at once or with rows of 8 tokens"
    if not size.micro_batch:
        return f"{ways[0]}; not one row of this job's length"
    return ", or ".join(ways) if size.max_length else f"{ways[0]}; at the job's batch size no length"


def accuracy_text(answer: PlanAccuracy, screen: Screen) -> str:
    """Predicted against measured: peaks, then times."""
    return f"{_peaks_text(answer, screen)}\n\n{_times_text(answer, screen)}"


def _times_text(answer: PlanAccuracy, screen: Screen) -> str:
    if not answer.times:
        return "No attempt whose time was predicted has ended yet."
    room = max(12, screen.width - 48)
    rows = [
        [
            fit(row.device_name, room),
            row.basis.value,
            str(row.count),
            f"{row.ratio:.2f}",
            f"x{row.off:.2f}",
            f"x{row.worst:.2f}",
        ]
        for row in answer.times
    ]
    headers = ["DEVICE", "BY", "RUNS", "MEDIAN", "OFF BY", "9 IN 10"]
    lines = table(headers, rows, screen, right=tuple(headers[2:]))
    notes = (
        "MEDIAN: the time that was taken over the one that was predicted, both as if alone on the card.",
        "OFF BY, 9 IN 10: the factor by which half of the predictions were off at most, and nine in ten.",
        *(f"{basis.value}: {basis.in_words}." for basis in dict.fromkeys(row.basis for row in answer.times)),
    )
    return joined([*lines, "", *(screen.dim(line) for note in notes for line in wrapped(note, "", screen))], screen)


def _peaks_text(answer: PlanAccuracy, screen: Screen) -> str:
    if not answer.rows:
        return "Nothing was measured on a GPU yet: every attempt that ends there adds to this table."
    rows = [
        [
            fit(row.device_name, max(12, screen.width - 60)),
            f"{row.method.value}, roomy" if row.roomy else row.method.value,
            fit(row.family or "–", 12),
            str(row.count),
            f"{row.ratio:.2f}",
            f"{row.spread:.2f}",
            f"{row.worst:.2f}",
            "–" if row.factor is None else f"{row.factor:.2f}",
        ]
        for row in answer.rows
    ]
    headers = ["DEVICE", "METHOD", "FAMILY", "RUNS", "MEAN", "SPREAD", "WORST", "FACTOR"]
    lines = table(headers, rows, screen, right=tuple(headers[3:]))
    notes = (
        "MEAN and WORST: measured over planned, the plan with its margin.",
        "With three runs or more, later plans are multiplied by FACTOR.",
    )
    return joined([*lines, "", *map(screen.dim, notes)], screen)
