"""The report's page in a real browser: it stands alone, shows its numbers, and runs nothing that people typed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loractl.common.errors import ArtifactError, ExitCode
from loractl.scheduler.report.answer import POLICY, guarded
from loractl.worker.evaluation.report import render_html

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>document.title='owned'</script><img src=http://127.0.0.1:9/x onerror=document.title='owned'>"


def report(**changes: Any) -> dict[str, Any]:
    """A small report of the form that build_report makes; tests/integration holds build_report to it."""
    metric = {
        "name": "loss",
        "label": "loss",
        "unit": "nats",
        "higher_is_better": False,
        "cases": 8,
        "base": 3.5,
        "tuned": 1.25,
        "low": -2.6,
        "high": -1.9,
        "change": -2.25,
        "reading": "better",
    }
    answer = {
        "row": 3,
        "prompt": EVIL,
        "expected": "a",
        "base": EVIL,
        "tuned": "a",
        "base_ended": False,
        "tuned_ended": True,
        "base_exact": False,
        "tuned_exact": True,
    }
    value = {
        "schema": 1,
        "job": {
            "job_id": 7,
            "name": "page",
            "user": EVIL,
            "attempt": 1,
            "node": "n:0",
            "gpu": "cpu",
            "device_name": "CPU",
            "labels": {},
        },
        "base_model": "base",
        "base": {"commit": "c" * 40, "sha256": "b" * 64, "files": {"config.json": "a" * 64}},
        "method": "lora",
        "method_why": "auto: it fits",
        "seed": 0,
        "wall_seconds": 99.0,
        "verdict": {"reading": "better", "short": "", "sentence": "Better than the base: held-out loss 3.50 -> 1.25."},
        "adapter": {
            "r": 4,
            "lora_alpha": 8.0,
            "lora_dropout": 0.0,
            "modules": ["q_proj"],
            "trainable_parameters": 10,
            "total_parameters": 1000,
            "bytes": 4000,
            "sha256": "f" * 64,
        },
        "data": {
            "format": "messages",
            "why": "the rows have messages",
            "sha256": "e" * 64,
            "train_rows": 20,
            "held_out_rows": 8,
            "train_tokens": 900,
            "supervised_tokens": 200,
            "truncated_rows": 0,
            "too_long_rows_dropped": 0,
            "bad_rows_dropped": 0,
            "overlap_rows_dropped": 0,
            "bad_rows": [],
        },
        "training": {
            "steps": 9,
            "resumed_from_step": None,
            "epochs": None,
            "seconds": 60.0,
            "tokens": 10_800,
            "changes": ["out of memory with 8 rows at once"],
            "threads": 2,
            "tokens_per_second": 180.0,
            "peak_memory_bytes": 2**31,
            "peak_memory_kind": "resident set",
            "vram_planned": None,
            "learning_rate": 0.001,
            "optim": "adamw_torch",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "precision": "bfloat16",
            "device": "cpu",
            "losses": [[1, 3.4], [5, 2.0], [9, 1.3]],
            "eval_losses": [[5, 2.1]],
        },
        "evaluation": {
            "rows": 8,
            "seconds": 3.0,
            "bootstrap": {"samples": 10000, "seed": 7, "interval": 0.95},
            "metrics": [metric],
            "answers": [answer],
            "labels": {
                "names": [EVIL, "b", "other"],
                "base": [[1, 2, 1], [0, 3, 1], [0, 0, 0]],
                "tuned": [[4, 0, 0], [1, 3, 0], [0, 0, 0]],
            },
            "turns": [
                {"turn": 1, "cases": 8, "base": 3.5, "tuned": 1.5},
                {"turn": 2, "cases": 5, "base": 3.1, "tuned": 1.1},
            ],
            "lm_eval": {
                "asked": ["lab"],
                "limit": 100,
                "version": "0.4.13",
                "seconds": 9.0,
                "metrics": [
                    {
                        **metric,
                        "label": "lab_queues acc",
                        "group": "lab",
                        "interval": "unpaired",
                        "base_stderr": 0.04,
                        "tuned_stderr": None,
                    }
                ],
            },
        },
        "versions": {"loractl": "0"},
    }
    return {**value, **changes}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_stands_alone_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_html(report()))
    dom = _chromium(tmp_path, "--dump-dom", page.as_uri())
    assert "<title>page · loractl</title>" in dom, "a script from an answer has run"
    assert 'id="loss-curve"' in dom and "Better than the base" in dom
    assert len(re.findall(r'<tr class="better">', dom)) == 1
    picture = tmp_path / "page.png"
    _chromium(tmp_path, f"--screenshot={picture}", "--window-size=1200,1500", page.as_uri())
    assert picture.stat().st_size > 20_000, "the page is not blank"


FORGED = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<svg onload=\"document.title='owned'\"></svg>",
    "<iframe srcdoc=\"<script>top.document.title='owned'</script>\"></iframe>",
    "<base href='http://127.0.0.1:9/'><link rel=stylesheet href=x.css><script src=x.js></script>",
    "<meta http-equiv=refresh content=\"0;url=javascript:document.title='owned'\">",
    "<svg><style><img src=x onerror=\"document.title='owned'\"></style></svg>",
    "<!--[if IE]><script>document.title='owned'</script><![endif]-->",
    "<?php echo 1 ?>",
    "<a href=\"javascript:document.title='owned'\">report</a>",
    "<form action=http://127.0.0.1:9/><input name=q></form>",
    "<object data=x></object>",
    "<p style='color:red' onclick=alert(1)>x</p>",
)
"""What somebody may put into a page that is stored."""


@pytest.mark.parametrize("part", FORGED)
def test_a_forged_page_is_refused(part: str) -> None:
    for page in (part, render_html(report()).replace("<body>", f"<body>{part}"), f"<html><head>{part}"):
        with pytest.raises(ArtifactError, match=r"the page of job 7 is not loractl's: it holds ") as refused:
            guarded(page.encode(), 7)
        assert refused.value.exit_code is ExitCode.FAILED
    with pytest.raises(ArtifactError, match="not UTF-8 text"):
        guarded(part.encode("utf-16"), 7)


def test_a_page_of_loractl_is_handed_out_whole_behind_a_policy() -> None:
    page = render_html(report())
    given = guarded(page.encode(), 7).decode()
    assert given.endswith(page) and given.index(POLICY) < given.index(page)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_forged_page_behind_the_policy_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy alone holds it, should the check ever miss something."""
    page = tmp_path / "report.html"
    monkeypatch.setattr("loractl.scheduler.report.answer._PageReader.feed", lambda self, text: None)
    page.write_bytes(guarded(f"<html><head><title>report</title></head><body>{''.join(FORGED)}".encode(), 7))
    assert "<title>report</title>" in _chromium(tmp_path, "--dump-dom", "--virtual-time-budget=2000", page.as_uri())


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    page = render_html(report())
    assert EVIL not in page, "what people typed is escaped"
    assert not re.findall(r"<(?:script|link|img|iframe)\b", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    ("reading", "word"),
    [
        ("worse", "✗ Worse"),
        ("no_measurable_gain", "No measurable gain"),
        ("no_clear_change", "– No clear change"),
        ("newer", "Newer"),
    ],
)
def test_the_page_says_it_when_there_is_no_gain(reading: str, word: str) -> None:
    assert word in render_html(report(verdict={"reading": reading, "short": "", "sentence": "s"}))


def test_a_page_without_answers_or_losses_still_renders() -> None:
    bare = json.loads(json.dumps(report()))
    bare["evaluation"]["answers"], bare["training"]["losses"], bare["training"]["eval_losses"] = [], [], []
    assert "No step was logged." in render_html(bare)


def _chromium(folder: Path, *args: str) -> str:
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        *args,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
