"""Where a joined machine keeps its addresses: modes, what an owner wrote himself, and nothing half done."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.artifacts import MARK
from loractl.common.errors import UsageError, WrongState, WrongStore
from loractl.common.settings import S3Keys, load_settings
from loractl.scheduler.lab.join import unit_text
from loractl.scheduler.lab.line import (
    LabAddresses,
    addresses_of,
    read_addresses,
    refuse_another_store,
    urls_with_certificates,
)
from loractl.scheduler.lab.place import Membership, Place

KEYS = S3Keys(access_key="loractl", secret_key="s3-secret", endpoint_url="http://10.0.0.5:7070", region="us-east-1")


def entry(**changed: object) -> Membership:
    fields = {
        "database_url": "postgresql://heron:pg-secret@10.0.0.5:5432/loractl?sslmode=require&channel_binding=require",
        "redis_url": "redis://:queue-secret@10.0.0.5:6379/0",
        "artifacts_url": "s3://loractl/lab",
        "host": "heron",
        "s3": KEYS,
    }
    return Membership(**{**fields, **changed})  # type: ignore[arg-type]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("LORACTL_", "AWS_"))]:
        monkeypatch.delenv(name)


def test_a_config_keeps_what_its_owner_wrote_and_is_private(tmp_path: Path, bare: None) -> None:
    place = Place(folder=tmp_path / "home", home=tmp_path / "home", service=False)
    place.folder.mkdir()
    place.file.write_text(
        '# mine\ndatabase_url = "postgresql://old@old/old"\nnotify = "me"\n\n[s3]\naccess_key = "a"\n'
        'secret_key = "b"\n\n[channels.ops]\nkind = "ntfy"\nurl = "https://ntfy.sh/x"\n'
    )
    with pytest.raises(WrongState, match="is in a lab"):
        place.refuse_joined(replace=False)
    place.refuse_joined(replace=True)
    for _ in range(2):
        with place.prepared(entry(files={place.folder / "queue-ca.pem": "PEM"})):
            assert "old@old" in place.file.read_text() or "heron" in place.file.read_text()
        assert place.file.stat().st_mode & 0o777 == 0o600
        settings = load_settings({"LORACTL_HOME": str(place.home)})
        assert settings.host == "heron" and settings.notify == ("me",) and settings.channels[0].name == "ops"
        assert settings.s3 == KEYS and "pg-secret" in settings.database_url and settings.redis_url
        assert sorted(p.name for p in place.folder.iterdir()) == ["config.toml", "queue-ca.pem"]
    assert "# mine" in place.file.read_text() and place.file.read_text().count("loractl join") == 1
    assert "secret" not in repr(settings) and "secret" not in repr(entry())


def test_a_body_that_fails_leaves_everything_as_it_was(tmp_path: Path, bare: None) -> None:
    place = Place(folder=tmp_path, home=tmp_path, service=False)
    place.file.write_text('notify = "me"\n')
    with pytest.raises(ZeroDivisionError), place.prepared(entry(files={tmp_path / "queue-ca.pem": "PEM"})):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
    assert place.file.read_text() == 'notify = "me"\n'


def test_an_environment_that_would_go_before_the_file_is_refused(
    tmp_path: Path, bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORACTL_REDIS_URL", "redis://elsewhere")
    with pytest.raises(WrongState, match="LORACTL_REDIS_URL is set here"):
        Place(folder=tmp_path, home=tmp_path, service=False).refuse_joined(replace=False)
    Place(folder=tmp_path, home=tmp_path, service=True).refuse_joined(replace=False)


def test_a_service_s_file_is_read_by_systemd_and_keeps_other_lines(tmp_path: Path, bare: None) -> None:
    place = Place(folder=tmp_path / "etc", home=tmp_path, service=True)
    place.folder.mkdir()
    place.file.write_text("HF_HOME=/data/hf\nLORACTL_HOST=old\nLORACTL_MODEL_ROOTS=/srv/models\n")
    with place.prepared(entry()):
        pass
    assert place.file.stat().st_mode & 0o777 == 0o600
    read = dict(line.split("=", 1) for line in place.file.read_text().splitlines() if not line.startswith("#"))
    values = {name: value.strip('"') for name, value in read.items()}
    assert values["HF_HOME"] == "/data/hf" and values["LORACTL_MODEL_ROOTS"] == "/srv/models"
    assert {k: v for k, v in values.items() if k in entry().variables()} == entry().variables()
    assert values["LORACTL_HOST"] == "heron" and values["AWS_SECRET_ACCESS_KEY"] == "s3-secret"
    assert not place.file.read_text().count("\\"), "no value needs an escape"
    assert place.variables() == values


def test_s3_keys_of_a_config_give_way_to_the_environment_s(
    tmp_path: Path, bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KEYS.options()["key"] == "loractl" and KEYS.options()["client_kwargs"] == {"region_name": "us-east-1"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert KEYS.options() == {}
    config = tmp_path / "config.toml"
    config.write_text('[s3]\naccess_key = "a"\nsecret_key = "hidden-word"\n')
    with pytest.raises(UsageError, match="others can read the file"):
        load_settings({"LORACTL_HOME": str(tmp_path)})
    config.chmod(0o600)
    for wrong in ('[s3]\naccess_key = "a"\n', '[s3]\naccess_key = "a"\nsecret_key = 3\n', "s3 = 7\n",
                  '[s3]\naccess_key = "a"\nsecret_key = "hidden-word"\nbucket = "b"\n'):  # fmt: skip
        config.write_text(wrong)
        with pytest.raises(UsageError) as error:
            load_settings({"LORACTL_HOME": str(tmp_path)})
        assert "[s3] names no account" in error.value.sentence and "hidden-word" not in str(error.value)


def test_addresses_lead_elsewhere_and_certificates_travel(tmp_path: Path, bare: None) -> None:
    (tmp_path / "ca.pem").write_text("PEM of the queue")
    settings = load_settings({
        "LORACTL_HOME": str(tmp_path),
        "LORACTL_DATABASE_URL": "postgresql://loractl:pw@127.0.0.1/loractl",
        "LORACTL_REDIS_URL": f"rediss://:pw@127.0.0.1:6380/0?ssl_ca_certs={tmp_path}/ca.pem",
        "LORACTL_ARTIFACTS_URL": (tmp_path / "ein Labor").as_uri(),
    })  # fmt: skip
    addresses = addresses_of(settings, server_has_tls=True, address="10.0.0.5")
    lab = read_addresses(replace(addresses, store_mark="ours").text())
    assert lab.redis_url == "rediss://:pw@10.0.0.5:6380/0" and lab.s3 is None
    assert lab.database_tls == {"sslmode": "require", "channel_binding": "require"}
    tls, redis_url, placed = urls_with_certificates(lab, Path("/etc/loractl"))
    assert redis_url.endswith("/0?ssl_ca_certs=/etc/loractl/queue-ca.pem") and tls == lab.database_tls
    assert placed == {Path("/etc/loractl/queue-ca.pem"): "PEM of the queue"}
    with pytest.raises(WrongStore, match="this machine has no such folder"):
        refuse_another_store(lab)
    for mark in ("ours", "another's"):
        (tmp_path / "ein Labor").mkdir(exist_ok=True)
        (tmp_path / "ein Labor" / MARK).write_text(mark)
        if mark == "ours":
            refuse_another_store(lab)
    with pytest.raises(WrongStore, match="another lab's mark"):
        refuse_another_store(lab)
    refuse_another_store(LabAddresses(database_tls={}, redis_url="redis://x", artifacts_url="s3://loractl/lab"))


def test_the_shipped_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("loractl")
    text = unit_text(command)
    assert f"ExecStart={command} worker" in text and "EnvironmentFile=/etc/loractl/worker.env" in text
    for needed in ("PrivateDevices=yes", "DevicePolicy=", "ProtectClock=yes", "MemoryDenyWriteExecute=yes"):
        assert f"\n{needed}" not in text, "CUDA would find no card, or could not compile"
    file = tmp_path / "loractl-worker.service"
    file.write_text(text.replace("User=loractl", "User=root"))
    try:
        done = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no systemd-analyze on this machine")
    assert (done.returncode, done.stderr) == (0, "")
    file.write_text(text.replace("KillMode=mixed", "KillMood=mixed"))
    wrong = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True)
    assert "KillMood" in wrong.stderr, "it reads the file"


def test_what_the_wheel_must_have_is_package_data() -> None:
    root = Path(__file__).parents[4]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for file in ("common/store/roles.sql", "common/store/invitations.sql", "scheduler/lab/compose.yaml",
                 "scheduler/lab/loractl-worker.service"):  # fmt: skip
        assert (root / file).exists() and any(Path(file).match(pattern) for pattern in patterns), file
