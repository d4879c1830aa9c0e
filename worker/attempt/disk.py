"""The check for disk space before a run: if the disk fills up later, the steps since the last checkpoint are lost."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.memory.config import read_shape
from loractl.common.memory.step import planned_labels
from loractl.common.memory.weights import adapter_tensors, optimizer_name, state_bytes
from loractl.common.units import GIB

from .log import FILE_LIMIT

LEAST_BYTES = GIB
"""Free bytes that any run needs: the estimate leaves out tokenizers and other users of the disk."""

CHECKPOINTS = 4
"""Checkpoints of a run on the disk at once: the engine keeps 2 and writes one more before it drops the older, and
another may still be uploading to the artifact store."""

TOKENISED = 6
"""Bytes of tokens for a byte of data: a token of about 4 characters takes 4 bytes in each of two columns, and as much
again if packed rows are passed between processes; shorter tokens, and the numbers of short rows, take more."""


def bytes_to_write(spec: JobSpec, method: Method, data_bytes: int = 0) -> int:
    """An upper bound of what an attempt may write into its folder and the cache, never below LEAST_BYTES.

    Checkpoints of adapter (fp32) and optimizer state, the result's adapter, the log, the data in tokenised form. For a
    model without a config.json on this box, LEAST_BYTES.
    """
    shape = read_shape(spec.base_model, spec.revision)
    adapter = state = 0
    if shape is not None:
        optimizer = optimizer_name(spec, method)
        for elements, count in adapter_tensors(shape, spec, planned_labels(spec, None)):
            adapter += 4 * elements * count
            state += state_bytes(optimizer, elements) * count
    writes = CHECKPOINTS * (adapter + state) + adapter + 2 * FILE_LIMIT + TOKENISED * data_bytes
    return max(LEAST_BYTES, writes)


def require_space(folder: Path, needed: int) -> None:
    """Raises OSError (ENOSPC) with a sentence if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        sentence = f"needs {needed / GIB:.1f} GiB on {_disk(folder)}, {free / GIB:.1f} are free"
        raise OSError(errno.ENOSPC, sentence)


def _disk(folder: Path) -> Path:
    """The mount point of the folder's file system, where a person must free space."""
    resolved = folder.resolve()
    return next(path for path in (resolved, *resolved.parents) if path.is_mount())
