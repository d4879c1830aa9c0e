"""Settings of compared jobs: of long ones the part in which they differ."""

from __future__ import annotations

from typing import Any

import pytest

from loractl.scheduler.compare.text import _settings


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["linear", "cosine"], ["linear", "cosine"]),
        ([1e-4, 2e-4], ["0.0001", "0.0002"]),
        (
            ["/lab/data/helpdesk-2026/train.jsonl", "/lab/data/helpdesk-2025/train.jsonl"],
            ["\u2026sk-2026/train\u2026", "\u2026sk-2025/train\u2026"],
        ),
        (["/lab/data/helpdesk/tickets.jsonl", "owner/name"], ["/lab/data/helpdesk/ticke\u2026", "owner/name"]),
    ],
)
def test_a_long_setting_shows_where_it_differs(values: list[Any], shown: list[str]) -> None:
    assert _settings(values) == shown
