"""A trainer whose kernel fails, in place of loractl's recipe: by LORACTL_TRAINER=tests.gpu.faulty_trainer.

GPU_FAULT says how: `assert` in a kernel, or an `address` that is nobody's. On a processor the errors are raised as CUDA
words them, so that the way from a trainer's error to the job's reason is rehearsed as well.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from loractl.worker.protocol.messages import Ended, Start
from loractl.worker.recipe import trainer

WILD = 'extern "C" __global__ void wild(float *given) { *(volatile float *)16 = given[0]; }'

SAID = {
    "assert": "CUDA error: device-side assert triggered",
    "address": "CUDA error: an illegal memory access was encountered",
}


def fail(how: str, device: str) -> NoReturn:
    """Provoke the fault on the card, and let CUDA's own error rise."""
    import torch

    if device == "cpu":
        raise RuntimeError(SAID[how])
    given = torch.ones(8, device="cuda")
    if how == "assert":
        given[torch.tensor([99], device="cuda")] += 1  # the index kernel asserts its bounds
    else:
        wild = torch.cuda._compile_kernel(WILD, "wild")
        wild(grid=(1, 1, 1), block=(1, 1, 1), args=[given])
    torch.cuda.synchronize()
    raise AssertionError(f"the card did not mind: {how}")


def train(run: object) -> Ended:
    """In place of the recipe's own."""
    order = run.order  # type: ignore[attr-defined]
    assert isinstance(order, Start)
    fail(os.environ["GPU_FAULT"], order.device)


if __name__ == "__main__":
    from loractl.worker.recipe import recipe

    recipe.train = train
    sys.exit(trainer.main())
