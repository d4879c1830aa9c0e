"""docs/gpu.md: every figure of `make gpu` in one table, or that it was never run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .experiments import EXPERIMENTS
from .rig import Figure

WHAT_IT_IS = """\
`make gpu` takes at most 8 minutes on one card of 40 GiB or more, plus the time to write 35 GB of models with random
weights. After three minutes, the first six experiments have shown whether it works, how fast, and with how much memory.
If time runs short, the last experiments are left out. `make gpu GPU=long` takes up to 40 minutes and 45 GB: speeds at
8B, LoRA at 8B, and the plans of all families. It writes this page, and exits non-zero if a line is not as it should be.

For a box without network: on a machine with network and with the same Python and kind of processor, `make wheels`
downloads all packages into `wheels/`. Copy that folder into the clone on the box, and `make gpu` installs from nothing
else. If `liger-kernel` is in `.venv` (`pip install liger-kernel`), the Trainer is also measured with its kernels.
"""

SEVERAL = """\
## Several cards: never run

`make gpu` uses one card. On a box with two, this shows what a processor can't, each line next to one card's training:

    python -m benchmarks.gang MODEL --cards 2

- whether NCCL adds up gradients and distributes weights between processes that each see only their own card;
- whether `fully_shard` trains over NF4 on CUDA, block by block, with the same losses as one card;
- how fast a step is with the whole base on each card, and with a part of it;
- how much the fullest card holds, compared with what `loractl plan` says.

It remains to check that no rank hangs in a kernel that waits for a dead rank: submit a job with
`--set resources.cards=2`, end its second process by `kill -9`, and check that `nvidia-smi` shows neither process, and
that the job continues from its checkpoint.

In a container NCCL may lack shared memory: Docker gives it 64 MiB (`--shm-size`). The job then says that its link
broke, and its log has NCCL's own message. NCCL's buffers are in the plan, but not in a trainer's limit.

The same lines on a processor, over gloo, are in [engine.md](engine.md#several-cards).
"""

SUSPECTED = """\
## Suspected: never seen

From the libraries' sources. Look here if a figure is not as it should be:

- Micro-batches copy their tokens from memory that is not pinned: this may limit a step of few tokens.
- bitsandbytes waits for the card after each tensor of its 8-bit optimizers, whether they page or not.
- The one kernel for rows of any length (`torch.nn.attention.varlen`) adds up in no fixed order backwards, so two runs
  may differ in bits, and holds some 0.1 GiB more at 8B with 4 rows of 1,024 tokens, which the plan leaves to its
  margin.
- A context grows as kernels are loaded. A training may load more of them than the self-test, and so exceed its
  reservation.
- If flash attention does not run (cards before Ampere, `dtype: float32`, heads of more than 192 numbers on a 3090 or
  4090), torch 2.13 has only plain products for heads that share keys and values. So these are repeated for each head,
  and torch should take its efficient kernel.
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
            "After this page you can check on a real card what a processor can't show: whether its kernels, its\n"
            "memory and its driver do what loractl relies on. There are no figures yet: no machine with a card was\n"
            "available."
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
