"""The loop: it asks members for micro-batches until each has come to its end."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from .member import PackMember
from .noise import noisy_embeddings


def run(members: Sequence[PackMember]) -> None:
    """Train members that share a base to their ends, a micro-batch of each in turn.

    What a member's callbacks and its forward pass raise comes through: with one member it is the job's own failure.
    """
    with contextlib.ExitStack() as noises:
        for member in members:
            noises.enter_context(noisy_embeddings(member.model, member.args.neftune_noise_alpha))
            member.begin()
        running = list(members)
        while running:
            for member in running:
                batch = member.next_batch()
                member.took(batch, member.forward.learn(batch, member.optimizer.backward))
            running = [member for member in running if not member.ended]
    for member in members:
        member.finish()
