"""What rows, logs and reports of others hold does not steer the terminal of who reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from loractl.common.artifacts import WEIGHTS, attempt_prefix, manifest_sha256, open_store
from loractl.common.job.status import Reason, Stage
from loractl.common.settings import Settings, load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import Claim, Progress, StoredResult
from loractl.common.store.store import Store
from loractl.common.store.tables import Adapter, Attempt, Job

from ..conftest import Cli
from ..models import weights_of
from ..unit.factories import node_state, submission, take
from .test_report_page import report

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\u2066evil\x7f\rover"
STEERS = "\x1b\x07\x9b\u202e\u2066\x7f\r"


@pytest.fixture
def lab(cli: Cli, home: Path, tmp_path: Path) -> Cli:
    """Jobs of each kind, of a person and on a card whose names are hostile, as no command of ours writes them."""
    settings = load_settings(cli.environment)
    engine = connect(settings)
    store = Store(engine)
    for name in ("ends", "fails", "runs", "waits", "held"):
        store.jobs.submit(replace(submission(name=name, max_retries=0), user=EVIL))
    store.jobs.hold(5, str(store.jobs.get(5).user), EVIL)
    card = {
        "gpu": EVIL,
        "device_name": EVIL,
        "labels": {EVIL: EVIL},
        "outside": [{"pid": 1, "user": EVIL, "name": EVIL, "bytes": 5}],
    }
    for number in (1, 2, 3):
        claim = take(store, **card)
        assert isinstance(claim, Claim)
        told = Progress(stage=Stage.TRAINING, step=1, total_steps=3, events=((EVIL[:20], EVIL),), log=f"{EVIL}\n")
        assert store.attempts.beat(claim, told).accepted
        if number == 1:
            store.attempts.finish(claim, Reason.OK, EVIL, Progress(), _result(settings, claim, tmp_path))
        elif number == 2:
            store.attempts.finish(claim, Reason.TRAINER_ERROR, EVIL, Progress())
    store.cards.see(node_state("waits:0", **card))
    with engine.begin() as connection:
        for column in (Job.name, Job.base_model, Job.node, Job.gpu, Job.family):
            connection.execute(update(Job).where(column.isnot(None)).values({column: EVIL}))
        connection.execute(update(Attempt).values(node=EVIL, message=EVIL))
        connection.execute(update(Adapter).values(name=EVIL, base_model=EVIL, uri=EVIL))
    store.cards.drain("box", EVIL, EVIL)
    engine.dispose()
    return cli


def test_nothing_that_others_wrote_steers_the_terminal(lab: Cli, tmp_path: Path) -> None:
    seen = 0
    for command in (
        ["status"], ["status", "-a"], ["status", "1"], ["status", "2"], ["status", "3"], ["status", "4"],
        ["status", "1", "--full"], ["status", "2", "--full"],
        ["status", "3", "--full"], ["logs", "2"], ["logs", "3"], ["why", "4"], ["why", "5"],
        ["why", "2"], ["why", "3"], ["gpus"], ["adapters"],
        ["report", "1"], ["gc", "--dry-run"], ["gc", "--keep-last", "0", "--dry-run"], ["report", "2"],
        ["retry", "5"], ["cancel", "4"], ["cancel", "3"], ["drain", "nobody", "--reason", "x"], ["undrain", "nobody"],
        ["status", "--json"], ["status", "2", "--json"], ["gpus", "--json"], ["adapters", "--json"],
        ["report", "1", "--json"],
        ["adapters", "pull", "1", str(tmp_path / "pulled")],
    ):  # fmt: skip
        done = lab(*command, code=None)
        said = done.stdout + done.stderr
        assert "Traceback" not in said and "fault of loractl" not in said, (command, said)
        steering = {c for c in STEERS if c in said}
        assert not steering, (command, steering, said)
        seen += "evil" in said
    assert seen > 15, "the hostile text was not shown at all"


def _result(settings: Settings, claim: Claim, folder: Path) -> StoredResult:
    """A stored result with a hostile report."""
    result = folder / "result"
    (result / "adapter").mkdir(parents=True)
    (result / "adapter" / "adapter_model.safetensors").write_bytes(weights_of("x"))
    value = report(base_model=EVIL)
    value["job"] |= {"user": EVIL, "node": EVIL, "gpu": EVIL, "labels": {EVIL: EVIL}}
    value["verdict"]["sentence"] = EVIL
    for answer in value["evaluation"]["answers"]:
        answer |= {"prompt": EVIL, "expected": EVIL, "base": EVIL, "tuned": EVIL}
    (result / "report.json").write_text(json.dumps(value))
    store, prefix = open_store(settings), attempt_prefix(claim.job_id, claim.attempt)
    manifest = store.put_result(result, prefix)
    uri = f"{store.url}/{prefix}"
    return StoredResult(
        adapter_uri=f"{uri}/adapter/{EVIL}", report_uri=uri, adapter_size=1, adapter_sha256=manifest[WEIGHTS].sha256,
        manifest_sha256=manifest_sha256(manifest),
    )  # fmt: skip
