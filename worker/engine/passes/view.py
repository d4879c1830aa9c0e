"""Views of a base: trees of modules over the same weights. What is changed in one is changed in no other."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from loractl.worker.base.arithmetic import keep_nf4_in_training_mode


def view_of(base: Any) -> Any:
    """A model with modules, flags and config of its own, and with the tensors of `base`: an adapter that is put on it,
    eval mode, or an attention chosen for it are nobody else's. It takes milliseconds and no memory of the device."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(base.parameters(), base.buffers())}
    for module in base.modules():
        if (state := getattr(module, "quant_state", None)) is not None:  # of an NF4 layer: scales of its weight
            memo[id(state)] = state
    view = copy.deepcopy(base, memo)
    keep_nf4_in_training_mode(view)  # what holds the base's layers in training mode holds the base's alone
    return view
