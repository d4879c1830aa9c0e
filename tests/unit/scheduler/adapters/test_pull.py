"""`adapters pull` of several adapters at once, for a server."""

from __future__ import annotations

import shlex
from pathlib import Path

from click.testing import CliRunner

from loractl.common.artifacts import ArtifactStore
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import Claim
from loractl.common.store.store import Store
from loractl.scheduler.adapters.command import pull

from .... import webs
from ...factories import spec, submission, take


def test_each_of_several_gets_a_folder_and_vllm_one_command(upgraded_home: Path, tmp_path: Path) -> None:
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    settings = load_settings(environment)
    store = Store(connect(settings))
    lab = webs.SeededLab(store=store, artifacts=ArtifactStore(settings.artifacts_url), now=store.now())
    for _ in range(2):
        store.jobs.submit(submission())
        claim = take(store)
        assert isinstance(claim, Claim)
        webs.store_result(lab, claim, 3.0, 1.0)
    done = CliRunner(env=environment).invoke(pull, ["1", "2", str(tmp_path / "new"), "--vllm"])
    assert done.exit_code == 0, done.output
    name = spec().name
    folders = [tmp_path / "new" / f"{number}-{name}" for number in (1, 2)]
    assert all((folder / "adapter_config.json").exists() for folder in folders)
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[:3] == ["vllm", "serve", "org/model"] and words[words.index("--max-loras") + 1] == "3"
    assert words[-2:] == [f"{name}-{number}={folder}" for number, folder in enumerate(folders, 1)]
