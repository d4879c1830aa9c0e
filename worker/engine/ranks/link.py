"""The link between the processes of one training: rank 0 gives orders, the others follow, and all sum up their
results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Answer = TypeVar("Answer")

LEADER = 0

BUCKET_BYTES = 64 * 2**20
"""Bytes summed at once: large enough for the link, small compared with a card."""

PATIENCE = timedelta(days=30)
"""How long a process waits for the others, which may tokenise, load or evaluate. A process that dies closes its
connections, which ends the others' wait at once."""

LOOPBACK = "lo"


@dataclass(frozen=True, kw_only=True)
class Link:
    """One process's end of the link. The processes meet in a file; all their communication stays on the loopback device
    and between the cards."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def open(cls, rank: int, size: int, meeting: Path, device: torch.device) -> Link:
        """Wait for the others, and join them. `meeting`: a file that nobody else may write, new each time."""
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = LOOPBACK
        store = dist.FileStore(str(meeting), size)
        kinds = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(kinds, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        return cls(rank=rank, size=size, device=device)

    def close(self) -> None:
        """All processes call it: one that left at once would tear down what another still reads."""
        self.meet()
        dist.destroy_process_group()

    def meet(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def in_turn(self, work: Callable[[], Answer]) -> Answer:
        """Do a piece of work in one process after another."""
        for _ in range(self.rank):
            self.meet()
        done = work()
        for _ in range(self.size - self.rank):
            self.meet()
        return done

    def any(self, here: bool) -> bool:
        """Whether something is true in any process; all processes ask."""
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def order(self, kind: str, **told: Any) -> None:
        """For the leader: send all others the next order."""
        text = torch.frombuffer(bytearray(json.dumps({"kind": kind, **told}).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor(len(text)), LEADER)
        dist.broadcast(text, LEADER)

    def orders(self) -> Iterator[dict[str, Any]]:
        """For the others: the leader's orders, as they come."""
        while True:
            length = torch.tensor(0)
            dist.broadcast(length, LEADER)
            text = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, LEADER)
            yield json.loads(bytes(text.tolist()))

    def sum_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Leave the sums over all processes in the leader's tensors; the others' are used up."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.reduce(flat, LEADER)
            _copy_out(flat, bucket)

    def spread(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put the leader's values into all processes' tensors."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.broadcast(flat, LEADER)
            _copy_out(flat, bucket)


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another process of the training is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one type, up to BUCKET_BYTES together unless one alone is larger."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _copy_out(flat: torch.Tensor, bucket: Sequence[torch.Tensor]) -> None:
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))
