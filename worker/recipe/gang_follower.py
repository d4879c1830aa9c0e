"""All that a process of a gang does which does not lead."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import set_seed

from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import choose_precision, compute_in
from loractl.worker.base.head import Head
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.source import family_of
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import PaddedPass
from loractl.worker.engine.ranks.follower import Follower
from loractl.worker.engine.ranks.part import OwnPass
from loractl.worker.protocol.messages import Ended

from .gang import Gang, base_of
from .run import Run


def follow(run: Run) -> Ended:
    """All that a process does which does not lead: it loads the model, and does its part of each step."""
    run.session.run(partial(_prepared, run)).follow(run.session.run)
    return Ended(job_id=run.order.job_id, reason=Reason.OK, message="", peaks=run.peaks())


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
        smoothing = spec.training.label_smoothing_factor
        if lean:
            return LeanPass(model, precision, smoothing)
        return PaddedPass(model, told["pad"], smoothing, compiled=spec.training.torch_compile, noise=noise)

    return Follower(model, gang.link, gang.shards, make_pass)
