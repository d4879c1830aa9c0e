"""docs/gpu.md: every figure of `make gpu` in one table, or that it was never run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .experiments import EXPERIMENTS
from .rig import Figure

WHAT_IT_IS = """\
`make gpu` asks a real card what the CPU's tests can't: whether its kernels, its memory and its driver do what loractl
counts on, and measures the engine there. It takes at most 8 minutes on one card of 40 GiB or more, and those in which
35 GB of models with random weights are written. After three the first five experiments have told whether it works, how
fast, and with how much memory. What it has no time for is left out, the last ones first. `make gpu GPU=long` takes up
to 40 minutes and 45 GB: speeds and packs at 8B, LoRA at 8B, and the plans of all families. It writes this page, and
ends non-zero when a line is not as it should be. `tests/gpu/test_rehearsal.py` runs its parts on a processor.

A box without network: `make wheels` on a machine that has one, with the same Python and kind of processor, downloads
into `wheels/` all that is installed. Copied into the clone on the box, it is all that `make gpu` installs from. With
`liger-kernel` in `.venv` (`pip install liger-kernel`) the Trainer with its kernels is measured, too.
"""

SEVERAL = """\
## Several cards: never run

`make gpu` uses one card. On a box with two, this shows what a processor can't, each line beside one card's training:

    python -m benchmarks.gang MODEL --cards 2

- that NCCL adds up gradients and spreads weights between processes that each see their own card alone;
- that `fully_shard` trains over NF4 on CUDA, block by block, with the losses of one card;
- how fast a step is with the whole base on each card, and with a part of it;
- what the fullest card holds, beside what `loractl plan` says.

And that no rank stays in a kernel that waits for one that died: submit a job with `--set resources.cards=2`, end its
second process by `kill -9`, and look that `nvidia-smi` shows neither, and that the job goes on from its checkpoint.

In a container NCCL may lack shared memory, of which Docker gives 64 MiB (`--shm-size`). The job then says that its link
broke, and its log has NCCL's own words. NCCL's buffers are in the plan and not in a trainer's limit.

On a processor, over gloo, the same lines are in [engine.md](engine.md#several-cards).
"""

SUSPECTED = """\
## Suspected: never seen

Read in the libraries' sources, and to be looked at where a figure is not as it should be:

- Each micro-batch copies its tokens from memory that is not pinned, and the processor waits for the card there: a step
  of a few tokens may be bound by that, and by the number of kernels that members' factors start.
- bitsandbytes waits for the card after each tensor of its 8-bit optimizers, whether they page or not.
- Each thread of a member has a cuBLAS workspace of 8 to 32 MiB. Its plan counts it; once the member has left it stays
  until the next thread takes it.
- Rows go through one kernel for rows of any lengths (`torch.nn.attention.varlen`) where it computes a few rows as plain
  products do; else the job's history says why they go row by row. Its backward pass adds up in no fixed order, so two
  runs may differ in bits; and it holds sums in fp32 and each head's own keys and values for all rows of a layer, which
  the plan leaves to its margin: some 0.1 GiB at 8B with 4 rows of 1,024 tokens.
- A context grows while kernels are loaded, each at its first use; a trainer's limit counts what it was at the start. A
  card keeps free what its self-test saw beyond that; a training may load more kernels than the self-test. What the
  figures show of a process beyond its reservation may be that.
- Where flash attention does not run (cards before Ampere, `dtype: float32`, heads of more than 192 numbers on a 3090 or
  4090), torch 2.13 has no fused kernel for heads that share keys and values but plain products, whose scores grow with
  the square of a row. There keys and values are repeated for each head, and torch is to take its efficient kernel.
- A mixture of experts in 16 bits is joined on the card, a layer at a time, beside the experts as the files have them:
  loading may take a layer more than the weights.
"""

NEVER = "# Real cards: never run"


def page(
    figures: Mapping[str, Sequence[Figure]], card: str | None, when: str = "", seconds: float = 0, making: float = 0
) -> str:
    """The page. `figures`: by experiment, none for one that was not reached; `card`: None before the first run;
    `making`: of the seconds, those in which models were made and written."""
    if card is None:
        asked = "\n".join(f"- {name}. {EXPERIMENTS[name].asks}" for name in figures)
        why = "No figure on this page: no machine with a card was at hand."
        return f"{NEVER}\n\n{why}\n\n{WHAT_IT_IS}\nIt asks:\n\n{asked}\n\n{SUSPECTED}\n{SEVERAL}"
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
