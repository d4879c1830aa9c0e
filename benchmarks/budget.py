"""What a card would do in a step, counted without one: python -m benchmarks.budget writes docs/budget.md.

It takes half a minute of a processor and a C++ compiler (tests/fake_cuda). The card's milliseconds are no measurement.
With `roomy` it prints what a step takes that recomputes nothing or every second block, in its own micro-batch and in
smaller ones.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fake_cuda import put_in, why_not

if TYPE_CHECKING:
    from tests.fake_cuda.budget import Shape, Step

PAGE = Path(__file__).parents[1] / "docs" / "budget.md"

HEAD = """\
# A step's budget on a card

No card was at hand: these figures are counted, not measured. `python -m benchmarks.budget` runs a step of real sizes on
tensors without content that lie on a stand-in for a card ([tests/fake_cuda](../tests/fake_cuda/__init__.py)), and
counts what torch would start there. `make test` counts two of these steps again, `make test-long` all; both fail where
a figure has changed by more than 2 %.

A step is one forward and one backward pass in bf16, with recomputation; r = 16 on all linear layers, dropout 0.05. All
rows have the same length, and all of their tokens but the first are learned. The optimizer's part is left out.
`loractl` is a job's default. `Trainer` is transformers' Trainer on peft's model, by `training.exact`, whose steps are
the Trainer's bit for bit. 0.5B is Qwen2.5's shape, 1B Llama 3.2's, 8B Llama 3's.

- Kernels: one for each operator that is no view. A product over NF4 starts four, attention's backward pass three, the
  gradient of a slice two.
- GB: every tensor that an operator is given is read once, every one that it makes is written once. Caches are left out.
  Elementwise is what is no product, no attention and no loss.
- TFLOP: of matrix products and attention; what is recomputed counts as often as it runs.
- Milliseconds: each call of an operator takes as long as its bytes or its products, at least 3 us a kernel (H100: 2.5).
  Assumed are 0.9 TB/s and 150 TFLOPS on a 4090, 2.6 TB/s and 600 TFLOPS on an H100.
- H100 waits: Python and torch take 15 to 25 us to start a kernel. Where that is more than the milliseconds, an H100
  waits for the rest of it.
- Blocks are alike: models of one and of two blocks are counted at full width, and each further block costs their
  difference.

| step | side | kernels | GB | elementwise | TFLOP | 4090, ms | H100, ms | H100 waits, ms |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


TAIL = """
## What is not done

- Larger chunks of the head (256 learned tokens at a time) save at most 2 % on an H100: the operations of a chunk take
  as long as reading the head's weight does. A chunk of 1,024 tokens over 128,000 words would take 0.8 GB more.
- SwiGLU and rotary positions by one kernel each way, as Liger has them in Triton, would save 3 % of 8B QLoRA 4 x 1024
  and 4 % of 1B LoRA 8 x 256 on a 4090, and 19 kernels a block (reckoned: torch does not see Triton's kernels as
  operators). Triton's interpreter computes both as torch does in fp32, Liger 0.8's SwiGLU after a change to the
  interpreter; in bf16 it is wrong (Triton 3.9), so no processor can try them in the type that cards train in.
- Dropout still costs 7 % and 10 % of these two steps, and a sixth of the kernels. One kernel that draws, drops and
  scales (torch has it) draws from the process's own generator, not from a member's.
- 1B LoRA 8 x 256 on a 4090 would take 130 ms without dropout. Of its 144 ms, products of the blocks take 85, the head
  22 (14 of them its products), dropout 14, SwiGLU and rotary positions 14, residuals and norms 6, attention 2. At 150
  TFLOPS its products and attention alone take 89.
- More or less than half of the blocks recomputed: only where no form without recomputing fits does half win
  ([placement.md](placement.md#room-that-nobody-else-wants)). There quarters would save 5 to 7 % more (1B LoRA 8 x 256
  on 8 GiB: 0.83 instead of 0.88), and need a size in each job's row, since the card's room would decide the share.
- One product for the A of layers that read the same input (queries, keys and values; gate and up) would need one mask
  for all of them. Without dropout it would save about 1 % of the time and 12 kernels a block.
- CUDA graphs would start a whole pass at once, which is what the small steps on an H100 wait for. A graph replays
  fixed shapes and addresses: rows would be padded to a few sizes again, each size and each set of members would need
  a graph of its own, dropout's generators would be registered with each, and a graph's memory stays taken between two
  steps, which the plan would have to know. Regions compiled by torch.compile (a block without its attention and its
  products) need none of that but Triton on the card's box, and a compilation when a trainer starts and when shapes
  change; its numbers can't be tried on a processor either, since there it makes C++.
"""


def main() -> None:
    if (why := why_not()) is not None:
        raise SystemExit(why)
    put_in()
    from loractl.worker.base.kernels import load_kernels

    load_kernels()
    from tests.fake_cuda.budget import SHAPES, WAYS, counted

    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["roomy"]:
        for shape in SHAPES.values():
            print_pieces(shape)
        return
    lines = [line(name, side, counted(shape, way)) for name, shape in SHAPES.items() for way, side in WAYS.items()]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n" + TAIL, "utf-8")


def print_pieces(shape: Shape) -> None:
    """The share that each number of rows at once takes of a step that recomputes, by card."""
    from tests.fake_cuda.budget import counted, shares

    whole, rows = counted(shape, "shared"), shape.rows
    while rows:
        some, pieces = replace(shape, rows=rows), shape.rows // rows
        none, every = counted(some, "shared", recomputes=False), counted(some, "shared")
        for what, steps in (("without", (none,)), ("every second block", (none, every))):
            found = ", ".join(f"{card} {share:.2f}" for card, share in shares(whole, steps, pieces).items())
            print(f"{shape.name}, {rows} at once, {what}: {found}", flush=True)
        rows //= 2


def line(name: str, side: str, step: Step) -> str:
    from tests.fake_cuda.budget import START_S

    counts = f"{step.kernels:,} | {step.gigabytes:,.1f} | {step.elementwise:,.1f} | {step.teraflop:,.2f}"
    card = " | ".join(f"{ms:,.0f}" for ms in step.milliseconds.values())
    waits = [max(0.0, 1e3 * step.kernels * start - step.milliseconds["H100"]) for start in START_S]
    return f"| {name} | {side} | {counts} | {card} | {' to '.join(f'{ms:,.0f}' for ms in waits) if any(waits) else 0} |"


if __name__ == "__main__":
    main()
