"""Who may write results into a lab's store, as join says it to a box without root."""

from __future__ import annotations

import getpass
import grp
import os
from pathlib import Path

from loractl.scheduler.lab.line import right_to_results


def test_the_right_to_store_results_names_the_folder_s_group(tmp_path: Path) -> None:
    here = grp.getgrgid(os.getgid()).gr_name
    (tmp_path / "jobs").mkdir()
    added = f"sudo usermod -aG {here} {getpass.getuser()}"
    assert right_to_results(tmp_path.as_uri()) == f"join as root, or be in the group {here}: {added}, then log in again"
    assert "usermod -aG loractl " in right_to_results((tmp_path / "not mounted").as_uri())
    assert right_to_results("s3://loractl/lab") == "ask the lab's owner for its right"
