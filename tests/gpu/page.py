"""docs/gpu.md: every figure of `make gpu` in one table, or that it was never run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .rig import Figure

WHAT_IT_IS = """\
`make gpu` asks a real card what the CPU's tests can't: whether its kernels, its memory and its driver do what loractl
counts on. It takes at most 8 minutes on one card of 40 GiB or more, 45 GB of disk for models with random weights, and
no network. It writes this page, and ends non-zero when a line is not as it should be. `tests/gpu/test_rehearsal.py`
runs its parts on a processor.
"""

SEVERAL = """\
## Several cards: never run

`make gpu` uses one card. `python -m benchmarks.gang MODEL --cards 2` on a box with two asks what a processor can't
show: that NCCL and `fully_shard` train there with the losses of one card, how fast, and what the fullest card holds
beside what `loractl plan` says. On a processor, over gloo, the same lines are in
[architecture.md](architecture.md#several-cards).
"""

NEVER = "# Real cards: never run"


def page(figures: Mapping[str, Sequence[Figure]], card: str | None, when: str = "", seconds: float = 0) -> str:
    """The page. `figures`: by experiment, none for one that was not reached; `card`: None before the first run."""
    if card is None:
        asked = "\n".join(f"- {name}" for name in figures)
        why = "No figure on this page: no machine with a card was at hand."
        return f"{NEVER}\n\n{why}\n\n{WHAT_IT_IS}\nIt asks:\n\n{asked}\n\n{SEVERAL}"
    wrong = sum(not figure.ok for part in figures.values() for figure in part)
    lines = [
        f"| {name} | {_cell(f.what)} | {_cell(f.value)} | {_mark(f)} |" for name, part in figures.items() for f in part
    ]
    lines += [f"| {name} | not reached | | no |" for name, part in figures.items() if not part]
    head = (
        f"# Real cards: run on {card}\n\n{when}, {seconds:.0f} s, {wrong} lines not as they should be.\n\n{WHAT_IT_IS}"
    )
    return "\n".join(
        [head, "| experiment | figure | value | as it should be |", "| --- | --- | --- | --- |", *lines, "", SEVERAL]
    )


def _mark(figure: Figure) -> str:
    return "yes" if figure.ok else "no"


def _cell(text: str) -> str:
    """One line, whatever an error says."""
    return " ".join(text.split()).replace("|", "\\|")[:400]
