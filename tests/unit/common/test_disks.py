"""Where SQLite may live."""

from __future__ import annotations

from pathlib import Path

import pytest

from loractl.common.errors import UsageError
from loractl.common.settings import load_settings
from loractl.common.store import database
from loractl.common.store.database import connect

ROOT = "20 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw"


NETWORK = dict.fromkeys(("nfs", "nfs4", "cifs", "fuse.sshfs"), True)


@pytest.mark.parametrize(("kind", "network"), {**NETWORK, "ext4": False, "fuse.portal": False}.items())
def test_a_home_on_a_network_disk_is_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, network: bool
) -> None:
    home = tmp_path / "our homes"
    (tmp_path / "mounts").write_text(
        f"{ROOT}\n30 20 0:40 / {str(home).replace(' ', chr(92) + '040')} rw shared:1 - {kind} server:/homes rw\n"
    )
    monkeypatch.setattr(database, "MOUNTS", tmp_path / "mounts")
    settings = load_settings({"LORACTL_HOME": str(home / "ada")})
    if not network:
        connect(settings).dispose()
        return
    with pytest.raises(UsageError, match=rf"our homes/ada is on a network disk \({kind}\), where SQLite can't lock"):
        connect(settings)
    assert database.network_disk(tmp_path) is None, "a folder next to the mount"


def test_of_two_mounts_on_one_point_the_later_one_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (f"30 20 0:40 / {tmp_path} rw - nfs4 a:/ rw", f"31 20 0:41 / {tmp_path} rw - xfs /dev/sdb rw", ROOT)
    (tmp_path / "mounts").write_text("\n".join(lines))
    monkeypatch.setattr(database, "MOUNTS", tmp_path / "mounts")
    assert database.network_disk(tmp_path / "home") is None
