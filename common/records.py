"""The values that cross the store's face: what is submitted, claimed, reported and finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .method import Method
from .policy import Need
from .status import Stage

if TYPE_CHECKING:
    from .spec import JobSpec  # pydantic's models take 80 ms to build, and who only reads jobs needs none


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What submit writes: the checked spec, where its data are, and what it is predicted to need."""

    spec: JobSpec
    user: str
    data: dict[str, Any]
    need: Need
    vram_needed: int | None
    vram_class: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to run one attempt, until the lease ends."""

    job_id: int
    attempt: int
    token: str
    user: str
    spec: JobSpec
    data: dict[str, Any]
    method: Method
    vram_planned: int | None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where an attempt stands. A field that is None leaves what the row holds."""

    stage: Stage | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    vram_peak: int | None = None
    resumed_from_step: int | None = None
    metrics: tuple[tuple[int, str, float], ...] = ()  # step, name, value
    events: tuple[tuple[str, str], ...] = ()  # kind, text
    log: str = ""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The database's answer to a heartbeat."""

    accepted: bool  # False: the lease is lost, stop at once and write nothing
    cancel_requested: bool = False


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """Verified artifacts of a successful attempt."""

    adapter_uri: str
    report_uri: str
    adapter_size: int
    adapter_sha256: str


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """What a node says of its device."""

    node: str
    host: str
    gpu: str
    device_name: str
    kind: str
    total: int
    free: int
    reserved: int = 0
    outside: list[dict[str, Any]] = field(default_factory=list)
    load: int | None = None
    temperature: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    draining: bool = False
