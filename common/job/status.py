"""A job's status, its stage while it runs, and the reason why an attempt ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Status(enum.StrEnum):
    """Where a job is in its life. A wish (cancel, hold) is a column, not a status."""

    QUEUED = "queued"  # waits for a device
    RUNNING = "running"  # an attempt holds a lease on it
    SUCCEEDED = "succeeded"  # adapter and report are stored and verified
    FAILED = "failed"  # ended without a result; the reason says why
    CANCELLED = "cancelled"  # ended because a person asked for it, or because its sweep stops its losers

    @property
    def is_terminal(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)

    @property
    def in_words(self) -> str:
        """What a job with this status does or did: is running, has failed, was cancelled."""
        verbs = {Status.SUCCEEDED: "has", Status.FAILED: "has", Status.CANCELLED: "was"}
        return f"{verbs.get(self, 'is')} {self.value}"


TRANSITIONS: dict[Status, frozenset[Status]] = {  # the store makes no other change
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELLED, Status.FAILED}),  # FAILED: a spec no worker can read
    Status.RUNNING: frozenset({Status.QUEUED, Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset({Status.QUEUED}),  # loractl retry
    Status.CANCELLED: frozenset({Status.QUEUED}),  # loractl retry
}


class Stage(enum.StrEnum):
    """Where in its run a RUNNING job is."""

    PREPARING = "preparing"  # fetching data, loading the model, tokenising
    TRAINING = "training"
    EVALUATING = "evaluating"
    STORING = "storing"  # uploading and verifying artifacts


class Reason(enum.StrEnum):
    """Why an attempt ended."""

    OK = "ok"
    BAD_SPEC = "bad_spec"
    BAD_DATA = "bad_data"
    MODEL_NOT_FOUND = "model_not_found"
    OUT_OF_MEMORY = "out_of_memory"
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    DIVERGED = "diverged"
    NOT_TRAINED = "not_trained"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    PRUNED = "pruned"
    PREEMPTED = "preempted"
    DRAINED = "drained"
    HOST_LOST = "host_lost"
    WORKER_LOST = "worker_lost"
    KILLED = "killed"
    GPU_ERROR = "gpu_error"
    DISK_FULL = "disk_full"
    BASE_MISSING = "base_missing"
    STORE_FAILED = "store_failed"
    EVALUATION_FAILED = "evaluation_failed"
    TRAINER_ERROR = "trainer_error"


class Blamed(enum.StrEnum):
    """What part of the lab failed the job, if it was no user's own fault."""

    CARD = "card"
    BOX = "box"  # all of its cards share what failed: the disk, the way to the store
    BASE = "base"  # the box lacks this job's base model: the job avoids it, and it stays open for the others


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a reason means for the job."""

    status: Status  # the job's status when it is not tried again
    retryable: bool  # may another attempt help?
    counts: bool  # does another attempt spend one of the user's max_retries?
    advice: str  # the next step for a person
    without_checkpoint: str | None = None  # instead, if the job has no checkpoint to continue from
    blames: Blamed | None = None  # a retry avoids it, and it is closed when it fails the jobs of others too

    def next_step(self, job_id: int, has_checkpoint: bool) -> str:
        """The advice for this job, with its number."""
        told = self.advice if has_checkpoint else self.without_checkpoint or self.advice
        return told.replace("JOB", str(job_id))


def _lab(cause: str) -> str:
    return f"nothing to do: {cause}; the job is tried again without spending its retries"


OUTCOMES: dict[Reason, Meaning] = {
    Reason.OK: Meaning(
        status=Status.SUCCEEDED, retryable=False, counts=False, advice="loractl report JOB shows the result"
    ),
    Reason.BAD_SPEC: Meaning(
        status=Status.FAILED, retryable=False, counts=False, advice="correct the job file and submit it again"
    ),
    Reason.BAD_DATA: Meaning(
        status=Status.FAILED,
        retryable=False,
        counts=False,
        advice="correct the data and submit the job again, or change a setting: "
        "loractl submit --like JOB --set KEY=VALUE",
    ),
    Reason.MODEL_NOT_FOUND: Meaning(
        status=Status.FAILED,
        retryable=False,
        counts=False,
        advice="check base_model: a hub id, or a folder that the worker can read (safetensors or GGUF)",
    ),
    Reason.OUT_OF_MEMORY: Meaning(
        status=Status.FAILED,
        retryable=True,  # while a permitted method or a larger card is left: Store decides
        counts=False,
        advice="lower dataset.max_length or lora.r, permit method: qlora, or wait for a larger card",
    ),
    Reason.HOST_OUT_OF_MEMORY: Meaning(
        status=Status.FAILED, retryable=True, counts=True, advice="the box ran out of RAM: submit to a larger one"
    ),
    Reason.DIVERGED: Meaning(
        status=Status.FAILED, retryable=False, counts=False, advice="lower training.learning_rate and submit again"
    ),
    Reason.NOT_TRAINED: Meaning(
        status=Status.FAILED,
        retryable=False,
        counts=False,
        advice="raise training.learning_rate or the number of steps, or lower training.warmup_steps, and submit again",
    ),
    Reason.TIMED_OUT: Meaning(
        status=Status.FAILED,
        retryable=False,
        counts=False,
        advice="loractl retry JOB --set resources.time_limit=2h continues from its checkpoint",
        without_checkpoint="loractl retry JOB --set resources.time_limit=2h starts again: there is no checkpoint",
    ),
    Reason.CANCELLED: Meaning(
        status=Status.CANCELLED, retryable=False, counts=False, advice="loractl retry JOB queues it again"
    ),
    Reason.PRUNED: Meaning(
        status=Status.CANCELLED,
        retryable=False,
        counts=False,
        advice="nothing to do: other members of its sweep did better; loractl retry JOB runs it to its end",
    ),
    Reason.PREEMPTED: Meaning(
        status=Status.FAILED, retryable=True, counts=False, advice=_lab("its card went to another job")
    ),
    Reason.DRAINED: Meaning(
        status=Status.FAILED, retryable=True, counts=False, advice=_lab("its card was drained, or its worker stopped")
    ),
    Reason.HOST_LOST: Meaning(  # of attempts that an earlier version ended
        status=Status.FAILED, retryable=True, counts=False, advice=_lab("its box went silent")
    ),
    Reason.WORKER_LOST: Meaning(
        status=Status.FAILED,
        retryable=True,
        counts=False,
        advice=_lab("its worker or box went silent"),
        blames=Blamed.CARD,
    ),
    Reason.KILLED: Meaning(
        status=Status.FAILED,
        retryable=True,
        counts=False,
        advice=_lab("somebody or something killed its trainer"),
        blames=Blamed.CARD,
    ),
    Reason.GPU_ERROR: Meaning(
        status=Status.FAILED, retryable=True, counts=False, advice=_lab("its card failed"), blames=Blamed.CARD
    ),
    Reason.DISK_FULL: Meaning(
        status=Status.FAILED,
        retryable=True,
        counts=False,
        advice="free space on the worker's disk, then loractl retry JOB",
        blames=Blamed.BOX,
    ),
    Reason.BASE_MISSING: Meaning(
        status=Status.FAILED,
        retryable=True,
        counts=False,
        advice="copy or mount the base model's folder on the box at the same path, then loractl release JOB",
        blames=Blamed.BASE,
    ),
    Reason.STORE_FAILED: Meaning(
        status=Status.FAILED,
        retryable=True,
        counts=False,
        advice="check the artifact store (LORACTL_ARTIFACTS_URL), then loractl retry JOB",
        blames=Blamed.BOX,
    ),
    Reason.EVALUATION_FAILED: Meaning(
        status=Status.FAILED, retryable=True, counts=True, advice="loractl logs JOB shows what failed"
    ),
    Reason.TRAINER_ERROR: Meaning(
        status=Status.FAILED, retryable=True, counts=True, advice="loractl logs JOB shows what failed"
    ),
}

STOPPED = frozenset({Reason.CANCELLED, Reason.PRUNED, Reason.PREEMPTED, Reason.DRAINED})
"""Reasons of an attempt that a person's order or the lab's rule stopped: nothing is wrong."""

BLAMED = {reason: meaning.blames for reason, meaning in OUTCOMES.items() if meaning.blames is not None}
"""What a reason blames; the others, and reasons that only a newer version knows, blame nothing."""

KEEPING = frozenset(
    reason
    for reason, meaning in OUTCOMES.items()
    if meaning.status is Status.FAILED and (meaning.retryable or reason is Reason.TIMED_OUT)
)
"""A job that failed so keeps its finished result and checkpoints until loractl gc: a retry continues from them."""

FAILS_AGAIN = frozenset({Reason.BAD_SPEC, Reason.BAD_DATA, Reason.DIVERGED, Reason.NOT_TRAINED})
"""The fault is the job's own: queued again as it is, it fails in the same way."""

LAB_FAILURE_LIMIT = 3
"""A job that the lab fails this often in a row, without a further checkpoint between, is held: it may be the cause."""

LAB_RETRY_DELAY_S = 10.0
"""Seconds before a job that met a failing card, disk or store, or a box without its base, is tried again; they may need
the time, and so may the log. After a lost worker it is tried again at once."""


def retry_delay_s(attempt: int) -> float:
    """Seconds to wait before attempt + 1, after a failure that counts: 10, 20, 40, ... at most 600."""
    return float(min(600, 10 * 2 ** min(attempt - 1, 6)))
