"""What a training leaves in its box's cache for later ones, and takes from there."""

from __future__ import annotations

from pathlib import Path

import torch

from loractl.common.job.names import REPRODUCES
from loractl.worker import base, engine, evaluation
from loractl.worker.base.box_cache import BoxCache
from loractl.worker.base.model import Learner
from loractl.worker.base.processor import arithmetic
from loractl.worker.base.source import BaseIdentity
from loractl.worker.data.prepared import PreparedData
from loractl.worker.engine import passes, ranks
from loractl.worker.engine.passes.check_cache import code_hash, flash_attention
from loractl.worker.evaluation.base_measurements import BaseMeasurements, slack
from loractl.worker.protocol.messages import FileKept
from loractl.worker.protocol.versions import installed_versions

from .reference import KeptScores
from .run import Run

WAIT_S = 1.0
"""How long a training waits for the hashes of its base's files: long enough to read those that were noted before."""


_ROOMS = base, engine, passes, ranks, evaluation

_CODE = code_hash(Path(__file__).parent, *(Path(str(room.__file__)).parent for room in _ROOMS))
"""As of the import: an upgrade replaces the files while this process continues with the old code."""


def measurements(run: Run, learner: Learner, identity: BaseIdentity) -> BaseMeasurements | None:
    """What jobs of this box have measured of the base. None for a job that repeats another one: it shows that all of it
    comes out again."""
    order = run.order
    if REPRODUCES in order.spec.labels:
        return None
    return BaseMeasurements(
        cache=_cache(run, learner, identity),
        turn=order.job_id,
        repeats=order.device == "cpu",
        precision=learner.precision.base,
    )


def pair_scores(run: Run, learner: Learner, identity: BaseIdentity, data: PreparedData) -> KeptScores | None:
    """What an earlier job of the box has left of scores of pairs, and what this one leaves."""
    order = run.order
    if REPRODUCES in order.spec.labels:
        return None

    def question() -> object:
        """Pairs are scored a micro-batch at a time, of the size that memory allows by then, and the first ones before
        the first step if it is limited: the bits may depend on the others in it."""
        asked, training = run.spec.evaluation, run.spec.training
        order_of_rows = training.seed, training.train_sampling_strategy
        batches = training.per_device_train_batch_size, training.gradient_accumulation_steps
        tried = order.memory_limit is not None, asked.per_device_eval_batch_size, asked.max_rows
        return "pairs", type(learner.scorer).__name__, data.digest, *order_of_rows, *batches, *tried

    return KeptScores(
        cache=lambda: _cache(run, learner, identity),
        may_be_left=lambda: bool(order.kept) and identity.is_known(WAIT_S),
        question=question,
        slack=0.0 if order.device == "cpu" else slack(learner.precision.base),
    )


def _cache(run: Run, learner: Learner, identity: BaseIdentity) -> BoxCache:
    order, training = run.order, run.spec.training
    box = order.node.rpartition(":")[0]
    # with another ancestor "base" is another model
    ancestor = None if order.init_from is None or learner.started is None else order.init_from.sha256
    how: list[object] = [order.method.value, learner.precision, order.parallel.value, len(order.ranks), order.run_code]
    how += [
        training.attn_implementation,
        training.exact,
        learner.scorer is None,
        training.torch_compile,
        run.spec.lora.modules_to_save,
    ]
    # what decides the last bits besides model, rows and our own code: device, a processor's threads, the libraries
    facts = arithmetic() if order.device == "cpu" else (order.device_name, torch.version.cuda)
    how += [_CODE, order.device, *facts, sorted(installed_versions().items()), flash_attention()]

    def tell(key: str, sha256: str) -> None:
        run.tell(FileKept(job_id=order.job_id, key=key, sha256=sha256))

    return BoxCache(
        folder=Path(order.cache_dir) / "measured",
        known=order.kept,
        about=[box, identity.wait(run.check_stop)["sha256"], ancestor, *how],
        tell=tell,
        note=lambda text: run.note("cache", text),
    )
