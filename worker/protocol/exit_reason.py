"""Why a trainer ended without a message: from its exit status, and from its last lines."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from loractl.common.job.status import Reason

from .card_error import last_card_error


def exit_reason(
    code: int | None,
    printed: Sequence[str] = (),
    *,
    kernel_kills: int | None = None,
    limited: bool = False,
    on_card: bool = False,
) -> dict[str, Any]:
    """Reason and sentence (`reason`, `message`) for a trainer that ended without a message.

    `code`: None for a trainer that even SIGKILL does not end. `printed`: its last lines; some libraries end the process
    after a line on standard error. `kernel_kills`: how many processes the kernel killed for memory while it ran; None
    if that is unknown; a kill then counts as one of the kernel's. `limited`: its RAM was limited. Not every library
    checks its allocations; some crash where torch raises.
    """
    if code is None:
        reason, where = (Reason.GPU_ERROR, "the card's driver") if on_card else (Reason.TRAINER_ERROR, "a disk")
        return {"reason": reason, "message": f"the trainer can't be ended: it waits in the kernel, as for {where}"}
    if code == -signal.SIGKILL:
        if kernel_kills == 0:
            who = "by a person or a program: the kernel counted no kill for memory"
            return {"reason": Reason.KILLED, "message": f"the trainer was killed (SIGKILL) {who}"}
        who = "most likely by the box's out-of-memory killer"
        who += ", whose kills can't be read here" if kernel_kills is None else ""
        return {"reason": Reason.HOST_OUT_OF_MEMORY, "message": f"the trainer was killed (SIGKILL), {who}"}
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    if (said := last_card_error(printed)) is not None:
        return {"reason": said[0], "message": f"the trainer ended ({how}) after it printed: {said[1]}"}
    if limited and code in (-signal.SIGSEGV, -signal.SIGABRT):
        name = signal.Signals(-code).name
        return {
            "reason": Reason.OUT_OF_MEMORY,
            "message": f"the trainer crashed ({name}), most likely at its limit of memory (LORACTL_TRAINER_RAM)",
        }
    return {"reason": Reason.TRAINER_ERROR, "message": f"the trainer ended without a result ({how})"}
