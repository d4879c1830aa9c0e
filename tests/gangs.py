"""Trainings over several processes: each rank is forked from the test, which has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.job.method import Parallel
from loractl.worker.protocol.messages import Ended, Rank, Start, Stepped, Told
from loractl.worker.recipe.run import Run, Stopped


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the leader told, and how each rank ended: its last word, or what it raised."""

    told: list[Told]
    ends: list[str]

    @property
    def losses(self) -> list[float]:
        return [m.metrics["loss"] for m in self.told if isinstance(m, Stepped) and "loss" in m.metrics]

    @property
    def held_out(self) -> list[float]:
        return [m.metrics["eval_loss"] for m in self.told if isinstance(m, Stepped) and "eval_loss" in m.metrics]


Watch = Callable[[Run, Told], None]
"""Sees what the leader tells, in its process."""


def train_on(
    order: Start,
    parallel: Parallel,
    size: int = 2,
    watch: Watch = lambda run, told: None,
    limit_of_others: int | None = None,
) -> Trained:
    """Train an order on so many ranks of this machine's processor; `none` is one process without a gang.

    `limit_of_others`: bytes of memory that the ranks have which do not lead.
    """
    with tempfile.TemporaryDirectory() as folder:
        context, answers = multiprocessing.get_context("fork"), []
        for one in orders_of(order, parallel, size, Path(folder) / "meeting", limit_of_others):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_be, args=(one, sender, watch), daemon=True)
            process.start()
            sender.close()
            answers.append((receiver, process))
        found = [_answer(receiver) for receiver, _ in answers]
        for _, process in answers:
            process.join()
    return Trained(told=found[0][1], ends=[end for end, _ in found])


def orders_of(
    order: Start, parallel: Parallel, size: int, meeting: Path, limit_of_others: int | None = None
) -> list[Start]:
    """What each rank is told."""
    if parallel is Parallel.NONE:
        return [order]
    ranks = [Rank(rank=rank, node=f"n:{rank}", gpu="cpu", device="cpu") for rank in range(size)]
    gang = {"parallel": parallel, "ranks": ranks, "meeting": str(meeting)}
    limits = [order.memory_limit, *[limit_of_others] * (size - 1)]
    own = [{"rank": rank.rank, "node": rank.node, "memory_limit": limits[rank.rank]} for rank in ranks]
    return [order.model_copy(update={**gang, **one}) for one in own]


def _answer(receiver: Any) -> tuple[str, list[Told]]:
    try:
        return receiver.recv()
    except EOFError:
        return "died", []


def _be(order: Start, sender: Any, watch: Watch) -> None:
    """One rank, in its own process."""
    import torch

    from loractl.worker.base.gauge import hold_to
    from loractl.worker.recipe.gang import follow
    from loractl.worker.recipe.recipe import train

    torch.set_num_threads(1)
    told: list[Told] = []
    run = Run(order=order, tell=told.append)

    def tell(message: Told) -> None:
        told.append(message)
        watch(run, message)

    run.tell = tell
    try:
        hold_to(order.memory_limit, order.device, order.gpu)
        ended: Ended = train(run) if order.rank == 0 else follow(run)
        end = ended.reason.value
    except Stopped:
        end = "stopped"
    except Exception as error:  # noqa: BLE001  told to the test
        traceback.print_exc()
        end = repr(error)
    sender.send((end, told))
    os._exit(0)
