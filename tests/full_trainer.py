"""loractl's trainer, whose sixth pass finds no memory until the job is in smaller pieces. What fails is one pass."""

from __future__ import annotations

import sys
from typing import Any

import torch

from loractl.worker.engine.loop import TrainingLoop
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.protocol.messages import Again, Ended, Start
from loractl.worker.recipe import trainer
from loractl.worker.recipe.orders import StopOrder

FULL_AT = 6


def run(order: Start, stop: StopOrder, tell: trainer.Tell) -> Ended | Again:
    learn, train, passes = LeanPass.learn, TrainingLoop.run, list[int]()

    def loop(self: TrainingLoop) -> Any:
        passes.clear()  # the comparison of the passes came before
        return train(self)

    def full(self: LeanPass, *of: Any) -> Any:
        passes.append(1)
        if order.adjustment.micro_batch is None and len(passes) == FULL_AT:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return learn(self, *of)

    TrainingLoop.run, LeanPass.learn = loop, full  # type: ignore[method-assign]
    return trainer._run(order, stop, tell)


if __name__ == "__main__":
    sys.exit(trainer.main(run))
