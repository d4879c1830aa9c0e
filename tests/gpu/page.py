"""docs/gpu.md: every figure of `make gpu` in one table, or that it was never run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .experiments import EXPERIMENTS
from .rig import Figure

WHAT_IT_IS = """\
`make gpu` takes at most 8 minutes on one card of 40 GiB or more, plus the time to write 35 GB of random models. After
three minutes, the first six experiments have shown whether it works, how fast, and in how much memory. If time runs
short, the last are left out. `make gpu GPU=long` takes up to 40 minutes and 45 GB: speeds and LoRA at 8B, and plans of
all families. It writes this page, and exits non-zero if a line is not as it should be.

For a box without network, run `make wheels` on a machine with network and the same Python and kind of processor, and
copy `wheels/` into the clone on the box. With `liger-kernel` in `.venv` the Trainer is also measured with its kernels.
"""

SEVERAL = """\
## Several cards: never run

On a box with two cards this shows, next to one card's training, whether NCCL adds gradients and `fully_shard` trains
over NF4 with the same losses, how fast a step is, and how much the fullest card holds beside the plan:

    python -m benchmarks.gang MODEL --cards 2

Then submit a job with `--set resources.cards=2` and end its second process by `kill -9`: `nvidia-smi` must show
neither process, and the job must continue from its checkpoint. In a container give NCCL shared memory
(`--shm-size=1g`): Docker's 64 MiB may break the link, and the job's log then has NCCL's message.
"""

SUSPECTED = """\
## Suspected: never seen

From the libraries' sources. Look here if a figure is not as it should be:

- Micro-batches copy their tokens from memory that is not pinned, which may limit a step of few tokens.
- bitsandbytes waits for the card after each tensor of its 8-bit optimizers.
- The kernel for rows of any length (`torch.nn.attention.varlen`) adds up in no fixed order backwards: two runs may
  differ in bits. At 8B it holds some 0.1 GiB more, which the plan leaves to its margin.
- A context grows with the kernels that are loaded, and so a training may exceed its reservation.
- Without flash attention (cards before Ampere, `dtype: float32`, heads of more than 192 numbers on a 3090 or 4090)
  shared keys and values are repeated for each head, so that torch 2.13 can take its efficient kernel.
- The experts of a mixture in 16 bits are joined on the card: loading may take a layer more than the weights.
"""

NEVER = "# Real cards: never run"


def page(
    figures: Mapping[str, Sequence[Figure]], card: str | None, when: str = "", seconds: float = 0, making: float = 0
) -> str:
    """The page. `figures`: by experiment, empty for one that was not reached; `card`: None before the first run;
    `making`: the part of the seconds in which models were made and written."""
    if card is None:
        asked = "\n".join(f"- {name}. {EXPERIMENTS[name].asks}" for name in figures)
        why = (
            "After this page you can check on a real card what a processor can't show: whether its kernels, memory\n"
            "and driver do what loractl relies on. There are no figures yet: no card was available."
        )
        return f"{NEVER}\n\n{why}\n\n{WHAT_IT_IS}\nThe experiments:\n\n{asked}\n\n{SUSPECTED}\n{SEVERAL}"
    wrong = sum(not figure.ok for part in figures.values() for figure in part)
    lines = [
        f"| {name} | {_cell(f.what)} | {_cell(f.value)} | {_mark(f)} |" for name, part in figures.items() for f in part
    ]
    lines += [f"| {name} | {_missing(name)} |" for name, part in figures.items() if not part]
    took = f"{seconds:.0f} s, {making:.0f} of them to make and write models"
    head = f"# Real cards: run on {card}\n\n{when}, {took}; {wrong} lines not as they should be.\n\n{WHAT_IT_IS}"
    return "\n".join(
        [
            head,
            "| experiment | figure | value | as it should be |",
            "| --- | --- | --- | --- |",
            *lines,
            "",
            SUSPECTED,
            SEVERAL,
        ]
    )


def _missing(name: str) -> str:
    """Why an experiment has no figures, and whether that is as it should be."""
    needed = name not in EXPERIMENTS or EXPERIMENTS[name].always
    return "not reached | | no" if needed else "no time was left | | "


def _mark(figure: Figure) -> str:
    return "yes" if figure.ok else "no"


def _cell(text: str) -> str:
    """One line, whatever an error says."""
    return " ".join(text.split()).replace("|", "\\|")[:400]
