"""What the rows say about a stored result or checkpoint, for code that reads it from the artifact store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loractl.common.artifacts import Binding, attempt_prefix

from .job.names import Reference

if TYPE_CHECKING:
    from loractl.common.store.records import StoredCheckpoint
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job


def result_binding(store: Store, job: Job) -> Binding:
    """The binding of a job's result. Raises WrongState when it was just removed."""
    prefix = attempt_prefix(job.job_id, job.attempt)
    if job.manifest_sha256 is not None:
        return Binding(prefix=prefix, manifest_sha256=job.manifest_sha256)
    row = store.adapters.get(Reference(job_id=job.job_id))
    return Binding(prefix=prefix, manifest_sha256=None, weights_sha256=row.sha256)


def checkpoint_binding(checkpoint: StoredCheckpoint) -> Binding:
    """The binding of the checkpoint that a row names."""
    return Binding(prefix=checkpoint.prefix, manifest_sha256=checkpoint.manifest_sha256)
