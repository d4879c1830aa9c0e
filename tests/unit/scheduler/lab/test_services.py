"""What doctor finds about the services, where it can be had without a server."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from loractl.common.settings import load_settings
from loractl.scheduler.lab.health.condition import Level
from loractl.scheduler.lab.health.services import see_database

from ...common.test_artifacts import small_disk


def test_a_home_on_a_disk_that_only_reads_has_no_database_that_is_ok(sqlite_template: Path, tmp_path: Path) -> None:
    home = tmp_path / "disk"
    settings = load_settings({"LORACTL_HOME": str(home)})
    with small_disk(home, "8m"):
        shutil.copy(sqlite_template, home / "loractl.db")
        assert [found.level for found in see_database(settings)] == [Level.OK]
        subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
        (found,) = see_database(settings)
        assert found.level is Level.ERROR and "can only be read" in found.sentence
