"""What supervisor and trainer say to each other: one JSON object a line, over the trainer's stdin and stdout.

Every message names its job, so that one trainer may later serve several jobs on the same base model.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from loractl.common.spec import JobSpec, Method
from loractl.common.status import Reason, Stage


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer peer may say more

    job_id: int


class Start(_Message):
    """Supervisor: train this job."""

    type: Literal["start"] = "start"
    attempt: int
    user: str
    node: str
    gpu: str
    device: Literal["cuda", "cpu"]
    spec: JobSpec
    method: Method
    vram_planned: int | None
    data_path: str  # a local file, or a hub id
    data_sha256: str | None
    eval_path: str | None
    output_dir: str  # becomes the stored result
    checkpoint_dir: str
    earlier_checkpoints: list[str]  # folders of earlier attempts, newest first
    cache_dir: str


class Stop(_Message):
    """Supervisor: end at the next step; `save` asks for a checkpoint first."""

    type: Literal["stop"] = "stop"
    save: bool


class StageChanged(_Message):
    """Trainer: a stage begins."""

    type: Literal["stage"] = "stage"
    stage: Stage


class Stepped(_Message):
    """Trainer: an optimizer step is done (not every one is told)."""

    type: Literal["step"] = "step"
    step: int
    total_steps: int
    metrics: dict[str, float] = Field(default_factory=dict)
    tokens_per_second: float | None = None
    eta_seconds: float | None = None


class Note(_Message):
    """Trainer: a line for the job's history."""

    type: Literal["note"] = "note"
    kind: str
    text: str
    resumed_from_step: int | None = None


class Ended(_Message):
    """Trainer: the job is over; with ok, the output folder is complete."""

    type: Literal["ended"] = "ended"
    reason: Reason
    message: str
    vram_peak: int | None = None


Order = Start | Stop
Told = StageChanged | Stepped | Note | Ended

_orders: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="type")])
_told: TypeAdapter[Told] = TypeAdapter(Annotated[Told, Field(discriminator="type")])


def encode(message: _Message) -> str:
    """One line, newline included."""
    return message.model_dump_json() + "\n"


def decode_order(line: str) -> Order:
    """What the supervisor sent. Raises pydantic.ValidationError (a ValueError)."""
    return _orders.validate_json(line)


def decode_told(line: str) -> Told:
    """What the trainer sent. Raises pydantic.ValidationError (a ValueError)."""
    return _told.validate_json(line)
