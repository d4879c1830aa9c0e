"""A base divided among ranks: each holds a part of every block, and all gather a block while it computes.

torch's fully_shard does it (FSDP2). Adapters are whole in every rank: they are small, and their optimizer, clip and
checkpoints stay those of one card. So are the embeddings, the last norm and the head: the head gets some tokens at a
time, and as often as a rank has any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import evaluating, random_streams_kept
from loractl.worker.base.failure import TrainingFailed

from .link import LEADER, Link


class Shards:
    """The divided blocks of an adapted model.

    For work that all ranks do at once, they gather in step. For work that the leader does alone, like an evaluation, it
    announces each block, and the others lend their parts.
    """

    def __init__(self, link: Link) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self._link = link
        self._mesh = init_device_mesh(link.device.type, (link.size,))
        self._in_step = False
        self._alone = False  # a pass of the leader alone has begun and not ended
        self._blocks: list[Any] = []

    def divide(self, model: Any) -> Any:
        """Keep this rank's part of a model, moving it from the box's memory to the device block by block. Returns the
        model."""
        from torch.distributed.fsdp import fully_shard

        link, mesh, decoder = self._link, self._mesh, model.get_base_model().base_model
        self._blocks = blocks_of(decoder)
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        for number, block in enumerate(self._blocks):
            block.to(link.device)
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
            block.register_forward_pre_hook(self._announce(number), prepend=True)
        divided = {parameter for block in self._blocks for parameter in block.parameters()}
        rest = [parameter for parameter in model.parameters() if parameter not in divided]
        for tensor in (*rest, *model.buffers()):
            tensor.data = tensor.data.to(link.device)
            if (state := getattr(tensor, "quant_state", None)) is not None:  # of an NF4 layer outside the blocks
                state.to(link.device)
        fully_shard(decoder, mesh=mesh, ignored_params=trained | set(rest))
        self._watch(decoder)
        # In the backward pass a block gathers the one before it in advance. By default torch derives that from the
        # order of all passes since the last step, and the leader does some alone: it would gather what no other rank
        # does.
        for number, block in enumerate(self._blocks):
            block.set_modules_to_backward_prefetch([self._blocks[max(0, number - 1)]])  # the first: itself, so nothing
        return model

    def begin(self, model: Any) -> None:
        """After all ranks have divided it: a first pass, in which torch finds its blocks."""
        device, decoder = self._link.device, model.get_base_model().base_model
        with random_streams_kept(), evaluating(model), self.together():
            decoder(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=False)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All ranks do the same, pass by pass."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def gather(self, number: int) -> None:
        """Lend this rank's part of a block."""
        self._blocks[number].unshard()
        self._blocks[number].reshard()

    def _announce(self, number: int) -> Any:
        def say(module: Any, inputs: Any) -> None:
            if not self._in_step and self._link.rank == LEADER:
                self._link.order("gather", unit=number)

        return say

    def _watch(self, decoder: Any) -> None:
        """If a pass of the leader alone runs out of memory, it leaves a block gathered, and no other pass may
        follow."""

        def begin(module: Any, inputs: Any) -> None:
            if self._alone:
                raise TrainingFailed(Reason.OUT_OF_MEMORY, "a pass through the divided model did not fit on its card")
            self._alone = not self._in_step

        def end(module: Any, inputs: Any, answer: Any) -> None:
            self._alone = False

        decoder.register_forward_pre_hook(begin, prepend=True)
        decoder.register_forward_hook(end)


def blocks_of(decoder: Any) -> list[Any]:
    """A decoder's blocks. Raises TrainingFailed(bad_spec) for a model without recognisable blocks."""
    count = decoder.config.get_text_config().num_hidden_layers
    for part in decoder.children():
        if isinstance(part, torch.nn.ModuleList) and len(part) == count:
            return list(part)
    what = f"training on several cards: {type(decoder).__name__} has no list of blocks, so its base can't be divided"
    raise TrainingFailed(Reason.BAD_SPEC, f"{what}; resources.parallel: data needs none")
