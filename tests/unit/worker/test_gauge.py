"""How much torch's allocator may take of a reservation, whatever the card's context takes."""

from __future__ import annotations

import pytest

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.memory.families import shape_of
from loractl.common.memory.plan import CONTEXT_BYTES, WORKSPACE_BYTES, plan
from loractl.worker.base.gauge import LEAST_BYTES, allocator_room

MIB = 2**20
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("context", [None, 150 * MIB, 500 * MIB, 730 * MIB])
@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_a_tiny_job_keeps_its_plan_on_every_card(method: Method, context: int | None) -> None:
    """cuBLAS's workspaces are 64 MiB on Hopper, where a context is larger than planned."""
    spec = JobSpec.model_validate(
        {
            "name": "tiny",
            "base_model": "/m",
            "dataset": {"path": "d.jsonl", "max_length": 64},
            "training": {"max_steps": 1},
        }
    )
    shape = shape_of(TINY)
    assert shape is not None
    planned = plan(shape, spec, method)
    room = allocator_room(planned.need_bytes, context)
    assert room >= planned.tensor_bytes + WORKSPACE_BYTES
    assert room <= planned.need_bytes - min(CONTEXT_BYTES, context or CONTEXT_BYTES)


def test_what_is_learned_from_other_jobs_leaves_room_for_a_computation() -> None:
    assert allocator_room(400 * MIB, None) == LEAST_BYTES > WORKSPACE_BYTES
