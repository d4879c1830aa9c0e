"""The messages between a node and the processes that it starts.

Supervisor and trainer: one JSON object per line, over the trainer's stdin and stdout; each names its job. Node and fork
server: packets over a socket. A card's self-test: one line of its output.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Method, Parallel
from loractl.common.job.sections import DatasetSpec
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason, Stage


class _Sent(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer peer may send more


class _Message(_Sent):
    job_id: int


class Peaks(_Sent):
    """The peaks of a trainer's memory so far, and what it holds now, in bytes; None: not measured."""

    allocated: int | None = None  # CUDA: by tensors
    reserved: int | None = None  # CUDA: by the allocator; on a CPU, the resident set
    process: int | None = None  # of the device, by the whole process, including the context
    held: int | None = None  # CUDA: of the device, by the whole process now, not a peak

    def above(self, newer: Peaks) -> Peaks:
        """The higher of each peak: two trainers may have run for one attempt."""
        ours, theirs = self.model_dump(), newer.model_dump()
        peaks = {name: max(filter(None, (ours[name], theirs[name])), default=None) for name in ours}
        return Peaks(**{**peaks, "held": newer.held})


class Taught(_Sent):
    """What the adapter of an earlier job was trained on."""

    job_id: int
    dataset: DatasetSpec | None = None  # None: it is not stored any more
    paths: dict[str, str] = Field(default_factory=dict)  # local files and hub ids, by the names of JobSpec.data_sets


class Ancestor(_Sent):
    """A stored adapter from which a training starts, on this box's disk."""

    path: str  # the folder with its files
    job_id: int
    name: str
    sha256: str  # of its weights
    taught: list[Taught] = Field(default_factory=list)  # its own rows, then those of the adapters before it

    def lineage(self) -> dict[str, int | str]:
        """What the new adapter's files record about it."""
        return self.model_dump(exclude={"path", "taught"})


class KnownFile(_Sent):
    """A file in this box's cache that an earlier job has left, as the database knows it."""

    key: str  # a hash of all that decides its content
    sha256: str  # of its content
    job_id: int  # that wrote it
    at: dt.datetime


class Rank(_Sent):
    """One process of a job on several cards, and its card."""

    rank: int  # 0 leads, and alone speaks for the job
    node: str
    gpu: str
    device: Literal["cuda", "cpu"]
    environment: dict[str, str] = Field(default_factory=dict)  # variables that show the process only its card
    memory_limit: int | None = None


class Start(_Message):
    """Supervisor: train this job."""

    type: Literal["start"] = "start"
    attempt: int
    user: str
    node: str
    gpu: str
    device: Literal["cuda", "cpu"]
    device_name: str = ""
    spec: JobSpec
    run_code: bool = False  # the box's owner trusts the base model's own code at the spec's revision
    method: Method
    method_why: str = ""  # why this one of several; empty if the job permits only one
    vram_planned: int | None
    vram_reserved: int | None = None  # this attempt's bytes of the card
    memory_limit: int | None = None  # allocations beyond this many bytes fail; None: no limit
    adjustment: Adjustment = Adjustment()  # what out-of-memory has changed in the job so far
    changes: list[str] = Field(default_factory=list)  # the same in words
    day: dt.date | None = None  # what a chat template that writes today's date is told; None: the day that it is
    data_path: str  # a local file, or a hub id
    data_sha256: str | None
    more_paths: list[str] = Field(default_factory=list)  # of dataset.more
    more_sha256: list[str | None] = Field(default_factory=list)
    eval_path: str | None
    eval_sha256: str | None = None
    final_path: str | None = None
    regression_path: str | None = None
    regression_sha256: str | None = None
    output_dir: str  # becomes the stored result
    checkpoint_dir: str
    earlier_checkpoints: list[str]  # folders of earlier attempts, newest first
    cache_dir: str
    kept: list[KnownFile] = Field(default_factory=list)  # what it may use of that folder, beyond what it can check
    init_from: Ancestor | None = None  # None: a fresh adapter
    lm_eval_tasks: str | None = None  # the box owner's folder of tasks for the lm-eval harness
    parallel: Parallel = Parallel.NONE
    ranks: list[Rank] = Field(default_factory=list)  # of all its processes; empty: it has only this one
    rank: int = 0  # of the process that gets this
    meeting: str | None = None  # the file in which the ranks meet; the leader creates it


class Stop(_Message):
    """Supervisor: end at the next step; `save` asks for a checkpoint first."""

    type: Literal["stop"] = "stop"
    save: bool


class StageChanged(_Message):
    """Trainer: a stage begins."""

    type: Literal["stage"] = "stage"
    stage: Stage


class Stepped(_Message):
    """Trainer: an optimizer step is done (not every step is reported)."""

    type: Literal["step"] = "step"
    step: int
    total_steps: int
    metrics: dict[str, float] = Field(default_factory=dict)
    tokens_per_second: float | None = None
    eta_seconds: float | None = None  # to the job's end, including the evaluation
    eta_spread_seconds: float | None = None  # half the width of a 95% interval
    evaluated: int | None = None  # rows and answers of base and tuned together, after the last step
    to_evaluate: int | None = None
    peaks: Peaks | None = None


class Adjusted(_Message):
    """Trainer: memory ran out and the run continues, adjusted; the accompanying note is for people."""

    type: Literal["adjusted"] = "adjusted"
    adjustment: Adjustment


class Planned(_Message):
    """Trainer: bytes that the job needs by method, from its own rows' lengths, and what its loaded base takes."""

    type: Literal["planned"] = "planned"
    lora: int | None = None
    qlora: int | None = None
    roomy: dict[str, Any] | None = None  # the same without recomputing, in the form of the job's row
    running: int | None = None  # of this attempt, if it got the room for that
    base: int | None = None  # of the device, measured once the base is loaded


class Note(_Message):
    """Trainer: a line for the job's history."""

    type: Literal["note"] = "note"
    kind: str
    text: str
    resumed_from_step: int | None = None


class Saved(_Message):
    """Trainer: a checkpoint is complete on this box's disk."""

    type: Literal["saved"] = "saved"
    step: int
    path: str


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileKept(_Message):
    """Trainer: a file for later jobs is in this box's cache."""

    type: Literal["file_kept"] = "file_kept"
    key: Sha256
    sha256: Sha256


class GoingOn(_Message):
    """Trainer: the job is at work, though it reports nothing else for long: it waits for another, or generates a long
    answer."""

    type: Literal["going_on"] = "going_on"


class Again(_Message):
    """Trainer: memory ran out in mid-training. This process ends, and another one of the attempt continues with
    less."""

    type: Literal["again"] = "again"
    adjustment: Adjustment
    change: str  # the same in words, for the report


class Ended(_Message):
    """Trainer: the job is over; with ok, the output folder is complete."""

    type: Literal["ended"] = "ended"
    reason: Reason
    message: str
    peaks: Peaks | None = None
    card: str | None = None  # of several cards, the one whose rank failed, by its node's name
    withdrawn: str | None = None  # the folder of the broken checkpoint that is the cause


Order = Start | Stop
Told = StageChanged | Stepped | Adjusted | Planned | Note | Saved | FileKept | GoingOn | Again | Ended

_orders: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="type")])
_told: TypeAdapter[Told] = TypeAdapter(Annotated[Told, Field(discriminator="type")])


def encode(message: _Message) -> str:
    """One line, including the newline."""
    return message.model_dump_json() + "\n"


def decode_order(line: str) -> Order:
    """What the supervisor sent. Raises pydantic.ValidationError (a ValueError)."""
    return _orders.validate_json(line)


def decode_told(line: str) -> Told:
    """What the trainer sent. Raises pydantic.ValidationError (a ValueError)."""
    return _told.validate_json(line)


def told_in(line: str) -> Told | None:
    """The message of a line of standard output; None for a library's."""
    try:
        return decode_told(line)
    except ValueError:
        return None


# The fork server's standard input is a Unix socket that keeps packets apart (SOCK_SEQPACKET). Once everything is
# imported the server sends READY. A request comes with three open files: the new trainer's standard input, output and
# error.

FORK_SERVER = "--fork-server"
"""The argument of a trainer's module that makes it the server; the kind of device follows."""

READY = b"ready"

PACKET = 4096
"""Bytes; no request and no answer is nearly as long."""

PLACEHOLDER = "LORACTL_WAITS"
"""The trainer's place for its marks: the last variable in the block that `/proc/PID/environ` shows. It is long enough,
with its value, to be overwritten by LORACTL_JOB with the longest number."""

PLACEHOLDER_VALUE = "-" * 24


class ForkRequest(_Sent):
    """Node: fork a trainer for this attempt."""

    job_id: int
    mark: str  # of the attempt, for the environment


class ForkAnswer(_Sent):
    """Server: the new trainer, or why there is none."""

    pid: int | None = None
    refusal: str = ""


class SelfTestReport(BaseModel):
    """What a card could do before it served. In bytes; None: unknown, or not reached."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fault: str | None  # why it can't train, with the next step; None: it can
    torch: str | None = None
    cuda: str | None = None  # for which torch was built
    driver: str | None = None
    capability: str | None = None  # like 9.0
    context: int | None = None  # of the device, by the process apart from the allocator, once it could compute
    context_after: int | None = None  # the same at the end: it grows as kernels are loaded
    workspaces: int | None = None  # taken by cuBLAS from the allocator
    process: int | None = None  # of the device, by the whole process, according to NVML
    sees_us: bool | None = None  # whether NVML lists this box's processes under their own PIDs
    seconds: float | None = None


def read_report(output: str) -> SelfTestReport | None:
    """The report in the test's output; None without one. Libraries print there too."""
    for line in reversed(output.splitlines()):
        try:
            return SelfTestReport.model_validate_json(line)
        except ValueError:
            continue
    return None
