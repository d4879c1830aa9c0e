"""A card's self-test report to its node: one JSON object on a separate line."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
