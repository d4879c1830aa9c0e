"""A trainer without torch: loractl's own pipes, protocol, checkpoints and files, and weights that prove how they came.

    LORACTL_TRAINER=tests.chaos.trainer

Its weights are a chain of hashes that begins with the spec and the data and grows by one link a step. Whoever knows the
job can tell the right end, so a step that was left out, done twice, or resumed from a torn file shows in the adapter.

On several cards each rank in turn makes a link, and no step is done before all ranks have answered: one that is gone,
stands still or answers something else is noticed as it is in loractl's own (gang.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

from loractl.common.artifacts import sha256_of
from loractl.common.job.identity import spec_digest
from loractl.common.job.status import Reason, Stage
from loractl.common.job.sweep import eval_interval
from loractl.worker.protocol.marker import close_checkpoint, newest_checkpoint
from loractl.worker.protocol.messages import Ended, Note, Saved, StageChanged, Start, Stepped
from loractl.worker.recipe.orders import StopOrder
from loractl.worker.recipe.other_ranks import LINK_LOST, OtherRanks
from loractl.worker.recipe.trainer import Tell, main

from ..quick_trainer import SLOW, TIMES
from .gang import Alone, Gang, Ranks, follow

STEP_S = 0.05

KEPT = 2
"""Checkpoints that stay on the disk, as with the real trainer."""

LEAVES = "leaves-a-process"
"""A job with this label starts a process in a session of its own, which does not end with the trainer."""

POISONED = "poisoned"
"""The loss of a job with this label is not a number from its third step on."""

BAD_CARDS = "bad-cards"
"""A box with a file of this name in its home has cards that fail every job at once."""

TRAP, GANG_TRAP = "stop-in-a-checkpoint", "stop-in-a-checkpoint-of-several-ranks"
"""Where a box's home has a file of this name, the next trainer that writes a checkpoint takes it, adds its number to
the name, and stands in the middle of a file until that is removed, or for STANDS_S."""

STANDS_S = 10.0

TENSOR = "chain"


def first_link(spec_hash: str, data_sha256: str) -> bytes:
    return hashlib.sha256(f"{spec_hash} {data_sha256}".encode()).digest()


def next_link(link: bytes, step: int) -> bytes:
    return hashlib.sha256(link + step.to_bytes(8, "big")).digest()


def loss_of(learning_rate: float) -> float:
    """What an evaluation finds: members of a sweep differ by that alone."""
    return 1.0 + abs(math.log10(learning_rate) + 3)


def last_link(spec_hash: str, data_sha256: str, steps: int) -> bytes:
    """What the adapter of a job must hold."""
    link = first_link(spec_hash, data_sha256)
    for step in range(1, steps + 1):
        link = next_link(link, step)
    return link


def run(order: Start, stop: StopOrder, tell: Tell) -> Ended:
    """Train; on several cards with a process for each, like loractl's own."""
    try:
        if order.rank:
            follow(order, next_link)
            return Ended(job_id=order.job_id, reason=Reason.OK, message="")
        if not order.ranks:
            return _train(order, stop, tell, Alone(next_link))
        gang = OtherRanks(order, tell, "tests.chaos.trainer")
        return gang.settle(_lead(gang.order, stop, tell))
    except OSError:
        return Ended(job_id=order.job_id, reason=Reason.TRAINER_ERROR, message=LINK_LOST)


def _lead(order: Start, stop: StopOrder, tell: Tell) -> Ended:
    try:
        with Gang(order, next_link) as ranks:
            return _train(order, stop, tell, ranks)
    except OSError as error:
        return Ended(job_id=order.job_id, reason=Reason.TRAINER_ERROR, message=f"{LINK_LOST}: {error!r}")


def _train(order: Start, stop: StopOrder, tell: Tell, ranks: Ranks) -> Ended:
    """A sleep and a hash a step. Raises OSError when another rank is gone."""
    job, steps = order.job_id, order.spec.training.max_steps
    assert steps is not None
    tell(StageChanged(job_id=job, stage=Stage.PREPARING))
    if any((folder / BAD_CARDS).exists() for folder in Path(order.checkpoint_dir).parents):
        return Ended(job_id=job, reason=Reason.GPU_ERROR, message="CUDA error: the card has fallen off the bus")
    if LEAVES in order.spec.labels:
        subprocess.Popen(["sleep", "3600"], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    data = sha256_of(Path(order.data_path))
    belongs_to = {"spec": spec_digest(order.spec), "method": order.method.value, "data": data}
    step, link = 0, first_link(spec_digest(order.spec), data)
    folders = [Path(order.checkpoint_dir), *map(Path, order.earlier_checkpoints)]
    found = newest_checkpoint(folders, belongs_to)
    if found is not None:
        step, link = found.step, bytes.fromhex((found.path / "link").read_text())
        text = f"resumed from the checkpoint of step {step}"
        tell(Note(job_id=job, kind="resumed", text=text, resumed_from_step=step))
    tell(StageChanged(job_id=job, stage=Stage.TRAINING))
    while step < steps:
        time.sleep(STEP_S)
        step += 1
        link = ranks.next_link(link, step)
        if POISONED in order.spec.labels and step > 2:
            return Ended(job_id=job, reason=Reason.DIVERGED, message="the loss is nan")
        left_s = (steps - step) * STEP_S * (TIMES if SLOW in order.spec.labels else 1)
        told = Stepped(
            job_id=job, step=step, total_steps=steps, metrics=_measured(order, step, steps), eta_seconds=left_s
        )
        tell(told)
        if step % order.spec.training.save_steps == 0 or step == steps or stop.saves.is_set():
            folder = _save(order, step, steps, link, belongs_to)
            tell(Saved(job_id=job, step=step, path=str(folder)))
        if stop.came.is_set():
            reason = Reason.DRAINED if stop.saves.is_set() else Reason.CANCELLED
            return Ended(job_id=job, reason=reason, message="stopped when asked to")
    tell(StageChanged(job_id=job, stage=Stage.EVALUATING))
    _write_result(Path(order.output_dir), order, link)
    return Ended(job_id=job, reason=Reason.OK, message=f"{steps} steps")


def _measured(order: Start, step: int, steps: int) -> dict[str, float]:
    every, found = order.spec.training.eval_steps, {"loss": 1 / step}
    if every is not None and step % eval_interval(every, steps) == 0:
        found["eval_loss"] = loss_of(order.spec.training.learning_rate)
    return found


def _take(order: Start, name: str) -> Path | None:
    """Take a file of this name in the box's home, which one process alone can. Returns it under its new name."""
    for folder in Path(order.checkpoint_dir).parents:
        with contextlib.suppress(FileNotFoundError):
            return (folder / name).rename(folder / f"{name}.{os.getpid()}")
    return None


def _stand(order: Start) -> None:
    sign, until = _take(order, GANG_TRAP if order.ranks else TRAP), time.monotonic() + STANDS_S
    while sign is not None and sign.exists() and time.monotonic() < until:
        time.sleep(0.05)


def _save(order: Start, step: int, steps: int, link: bytes, belongs_to: dict[str, str]) -> Path:
    folder = Path(order.checkpoint_dir)
    target = folder / f"checkpoint-{step}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "link").write_text(link.hex())
    with (target / "optimizer.bin").open("wb", buffering=0) as file:
        file.write(link * 256)
        _stand(order)
        file.write(link * 256)
    close_checkpoint(target, step=step, finished=step == steps, belongs_to=belongs_to)
    made = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for older in made[:-KEPT]:
        shutil.rmtree(older)
    return target


def _write_result(folder: Path, order: Start, link: bytes) -> None:
    (folder / "adapter").mkdir(parents=True)
    header = json.dumps({TENSOR: {"dtype": "U8", "shape": [len(link)], "data_offsets": [0, len(link)]}}).encode()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + link)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    report = {"job_id": order.job_id, "attempt": order.attempt, TENSOR: link.hex()}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "report.html").write_text(f"<!doctype html><title>{order.job_id}</title>{link.hex()}\n")
    (folder / "job.json").write_text(json.dumps(order.spec.model_dump(mode="json")))


def read_adapter(raw: bytes) -> bytes:
    """The tensor of a safetensors file. Raises ValueError, struct.error or KeyError when it can't be loaded."""
    (size,) = struct.unpack("<Q", raw[:8])
    begin, end = json.loads(raw[8 : 8 + size])[TENSOR]["data_offsets"]
    body = raw[8 + size :]
    if len(body) != end:
        raise ValueError(f"{len(body)} bytes of tensors, its header names {end}")
    return body[begin:end]


if __name__ == "__main__":
    sys.exit(main(run))
