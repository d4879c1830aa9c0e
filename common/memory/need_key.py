"""Which jobs need the same memory: measured peaks of one teach the plan of the other."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from loractl.common.job.kinds import ANSWERS
from loractl.common.job.sections import PromptTemplate

from .correction import ENGINE

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec


def need_key(spec: JobSpec, data: dict[str, Any]) -> str:
    """A hash of all that decides a job's memory: jobs with the same key need the same."""
    deciding = spec.model_dump(
        mode="json",
        include={
            "base_model": True,
            "dataset": {"path", "eval_path", "format", "max_length", "on_overflow"},
            "lora": {"r", "target_modules", "modules_to_save", "use_dora"},
            "training": {
                "per_device_train_batch_size",
                "gradient_checkpointing",
                "optim",
                "packing",
                "dtype",
                "attn_implementation",
                "exact",
                "torch_compile",
                "neftune_noise_alpha",
            },
            "evaluation": {"per_device_eval_batch_size", "max_new_tokens", "samples"},
        },
    )
    deciding["engine"] = ENGINE
    deciding["lora"]["dropout"] = spec.lora.lora_dropout > 0  # its masks are kept for the backward pass
    if spec.dataset.template is not PromptTemplate.CHAT:
        deciding["dataset"] |= {"template": spec.dataset.template.value}
    # The rest only where it is set: what was measured under the key's older form still counts.
    if spec.task_type is not ANSWERS.task:
        deciding["task_type"] = spec.task_type.value
    if spec.training.engine != "auto":
        deciding["training"]["engine"] = spec.training.engine
    if spec.revision is not None:
        deciding["revision"] = spec.revision
    hashes = {name: stored["sha256"] for name, stored in data.items()}
    if not spec.dataset.is_one_whole or spec.dataset.eval_split is not None:
        read = spec.dataset.model_dump(mode="json", include={"more", "split", "eval_split"})
        deciding["dataset"] |= {"read": read | {"hashes": [digest for _, digest in sorted(hashes.items())]}}
    if spec.dataset.final_path is not None:
        deciding["dataset"] |= {"final_path": spec.dataset.final_path}
    if spec.dataset.columns:
        deciding["dataset"] |= {"columns": dict(spec.dataset.columns)}
    if hashes:
        deciding["dataset"] |= {"path": hashes.get("path"), "eval_path": hashes.get("eval_path")}
        deciding["dataset"] |= {"final_path": hashes["final_path"]} if "final_path" in hashes else {}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
