"""The tests' warm starts are warm: a whole run in which all of them fall back to cold ones takes twice as long."""

from __future__ import annotations

from collections.abc import Callable

import peft  # noqa: F401  what the stack leaves in this process's environment must not make the commands' another

from .. import warm
from ..conftest import Cli


def test_a_command_of_a_process_that_has_the_stack_is_forked(make_cli: Callable[..., Cli]) -> None:
    assert "loractl" in make_cli(**{warm.ALWAYS: "1"})("--version").stdout


def test_a_command_with_another_setting_of_the_stack_starts_cold(make_cli: Callable[..., Cli]) -> None:
    other = {"HF_HOME": "/nowhere"}
    assert "loractl" in make_cli(**other)("--version").stdout
    failed = make_cli(**{warm.ALWAYS: "1", **other})("--version", code=1)
    assert "not warm" in failed.stderr and "/nowhere" in failed.stderr
