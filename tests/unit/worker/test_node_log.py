"""The log of a node whose worker was killed: nobody reads it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys

import pytest

from loractl.worker.node.node import LogHandler


def test_a_line_that_nobody_reads_is_dropped_silently_and_a_wrong_one_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, write = os.pipe()
    os.close(read)
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    pipe = os.fdopen(write, "w")
    logger = logging.Logger("node")
    logger.addHandler(LogHandler(pipe))
    logger.warning("the database is away")
    assert told.getvalue() == ""
    logger.warning("%d jobs", "three")
    assert "--- Logging error ---" in told.getvalue()
    with contextlib.suppress(BrokenPipeError):  # what was lost is in its buffer
        pipe.close()
