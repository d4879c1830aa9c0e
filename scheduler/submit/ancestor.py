"""The stored adapter that a job begins from: found, compared with the job, and named by its job's number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loractl.common.errors import AdapterNotFound, UsageError
from loractl.common.fingerprint import may_be_published
from loractl.common.job.ancestor import misfits
from loractl.common.job.file import override_spec
from loractl.common.job.reference import parse_reference

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec
    from loractl.common.store.store import Store


def settle_ancestor(spec: JobSpec, store: Store) -> JobSpec:
    """The spec with the number of the job whose adapter it begins from: names and tags move. It says publish: false
    where that adapter, or one merged into its base, may not be published: whatever becomes of their rows and folders.

    Raises JobNotFound, AdapterNotFound, UsageError for an adapter of another base, rank or layers.
    """
    if not may_be_published(spec.base_model):
        spec = spec.model_copy(update={"publish": False})
    if (text := spec.lora.init_from) is None:
        return spec
    try:
        row = store.adapters.get(parse_reference(text))
    except AdapterNotFound as error:
        raise UsageError(f"lora.init_from: {error.sentence}", "loractl adapters lists them") from error
    ancestor = override_spec(store.jobs.get(row.job_id).spec, (), f"job {row.job_id}")
    if wrong := misfits(spec, ancestor):
        raise UsageError(
            f"{spec.name} can't begin from {row.name} (job {row.job_id}): {'; '.join(wrong)}",
            "write what that adapter has, or leave lora.init_from out",
        )
    lora = spec.lora.model_copy(update={"init_from": str(row.job_id)})
    return spec.model_copy(update={"lora": lora, "publish": spec.publish and ancestor.publish})
