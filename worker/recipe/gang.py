"""The processes of a gang: what they prepare together (their link, the model, how they divide it), and all the work of
a follower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import set_seed

from loractl.common.job.method import Parallel
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import Precision, choose_precision, compute_in
from loractl.worker.base.gauge import in_own_thread
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import Head, load_base
from loractl.worker.base.source import family_of
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import PaddedPass
from loractl.worker.engine.ranks.link import Link
from loractl.worker.engine.ranks.part import DividedPass, Follower, OwnPass
from loractl.worker.engine.ranks.shards import Shards
from loractl.worker.protocol.messages import Ended, Start

from .run import Run

Answer = TypeVar("Answer")


class Gang:
    """One process's side of a training on several cards."""

    def __init__(self, order: Start) -> None:
        """Wait for the others. Call it only after every check that may end this process by itself, as for bad data."""
        assert order.meeting is not None
        device = torch.device(order.device)
        self.link = Link.open(order.rank, len(order.ranks), Path(order.meeting), device)
        self.shards = Shards(self.link) if order.parallel is Parallel.SHARDED else None

    def adapted(self, load: Callable[[], Any]) -> Any:
        """The model from `load`, divided if the job's base is: then one process after another holds a whole base in the
        box's memory."""
        if (shards := self.shards) is None:
            return load()
        model = self.link.in_turn(lambda: shards.divide(load()))
        shards.begin(model)
        return model

    def lead(self, own: OwnPass, spec: JobSpec, precision: Precision) -> DividedPass:
        """The pass in which all ranks do their parts."""
        noise = spec.training.neftune_noise_alpha
        return DividedPass(own, self.link, self.shards, scales=precision.amp == "fp16", noise=noise)


def gathered(order: Start, head: Head | None, pad: int) -> Gang | None:
    """For the leader: meet the others, and send them the model to load, whose rows are padded with `pad`. None for a
    job on one card."""
    if not order.ranks:
        return None
    gang = Gang(order)
    gang.link.order("load", head=None if head is None else asdict(head), pad=pad)
    return gang


def base_of(order: Start, precision: Precision, head: Head | None) -> Any:
    """The order's loaded base; in the box's memory if cards divide it. Raises TrainingFailed."""
    spec = order.spec
    return load_base(
        spec.base_model,
        order.method,
        order.device,
        precision,
        spec.revision,
        run_code=order.run_code,
        attention=spec.training.attn_implementation,
        head=head,
        divisible=order.parallel is Parallel.SHARDED,
    )


def follow(run: Run) -> Ended:
    """All the work of a follower: it loads the model, and does its part of each step."""
    _prepared(run).follow(in_own_thread)
    return Ended(job_id=run.order.job_id, reason=Reason.OK, message="", peaks=run.gauge.look())


def _prepared(run: Run) -> Follower:
    order, spec = run.order, run.spec
    gang = Gang(order)
    told = next(gang.link.orders())
    head = None if told["head"] is None else Head(**{**told["head"], "labels": tuple(told["head"]["labels"])})
    precision = choose_precision(order.device, spec.training.dtype, family_of(spec.base_model, spec.revision))
    set_seed(spec.training.seed)

    def load() -> Any:
        run.say(f"loads {spec.base_model} on {order.node}")
        return add_adapter(base_of(order, precision, head), spec, order.method)

    model = gang.adapted(load)
    compute_in(model, precision)

    def make_pass(lean: bool, noise: float | None) -> OwnPass:
        loss = run.kind.loss(spec)
        if lean:
            return LeanPass(model, precision, loss=loss, fuses=False)
        return PaddedPass(model, told["pad"], compiled=spec.training.torch_compile, noise=noise, loss=loss)

    return Follower(model, gang.link, gang.shards, make_pass)
