"""compose.yaml and its passwords, as far as they can be proved without an engine."""

from __future__ import annotations

import re
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from loractl.common.errors import LoractlError, WrongState
from loractl.common.settings import load_settings
from loractl.scheduler.lab.lab import start_containers, write_compose

ROOT = Path(__file__).parents[4]
DOCUMENTED = {
    # https://hub.docker.com/_/postgres, "Environment Variables"
    "postgres": {"POSTGRES_PASSWORD", "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_INITDB_ARGS", "PGDATA"},
    # valkey-cli --help, "-a": REDISCLI_AUTH
    "valkey/valkey": {"VALKEY_EXTRA_FLAGS", "REDISCLI_AUTH"},
    # https://github.com/versity/versitygw: cmd/versitygw/main.go, the flags' EnvVars
    "versity/versitygw": {"ROOT_ACCESS_KEY", "ROOT_SECRET_KEY", "VGW_PORT", "VGW_REGION", "VGW_HEALTH", "VGW_IAM_DIR"},
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(files("loractl.scheduler.lab").joinpath("compose.yaml").read_text())
    return found


def test_passwords_are_drawn_once_and_are_their_owner_s(tmp_path: Path) -> None:
    first = write_compose(tmp_path / "compose", "10.0.0.5")
    assert len({first[name] for name in ("POSTGRES_PASSWORD", "VALKEY_PASSWORD", "S3_SECRET_KEY")}) == 3
    env = tmp_path / "compose" / ".env"
    assert env.stat().st_mode & 0o777 == 0o600
    assert write_compose(tmp_path / "compose", "10.0.0.7") == {**first, "LORACTL_BIND": "10.0.0.7"}
    env.write_text("POSTGRES_PASSWORD=mine\n")
    assert write_compose(tmp_path / "compose", "10.0.0.7")["POSTGRES_PASSWORD"] == "mine", "as somebody has set it"


def test_every_service_is_bounded_and_published_on_the_lab_s_address_alone(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        image, _, version = service["image"].partition(":")
        assert re.fullmatch(r"v?\d[\w.-]*", version), f"{name} has no version"
        assert set(service.get("environment", {})) <= DOCUMENTED[image], name
        assert "${" not in str(service.get("command")) + str(service.get("entrypoint")), "arguments are for all to see"
        if service["restart"] == "no":
            continue
        assert service["mem_limit"] and service["healthcheck"]["retries"]
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
        assert all(port.startswith("${LORACTL_BIND:-127.0.0.1}:") for port in service["ports"])
    assert "max_connections=300" in compose["services"]["postgres"]["command"]


def test_what_it_needs_is_what_init_writes(compose: dict[str, Any], tmp_path: Path) -> None:
    asked = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    assert asked == set(write_compose(tmp_path, "10.0.0.5")), "no more, no less"


def test_compose_itself_takes_the_file(tmp_path: Path) -> None:
    """docker compose config needs no engine: it reads the schema, and puts .env in."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("no Docker Compose on this machine: apt-get install docker-compose")
    values = write_compose(tmp_path, "10.0.0.5")
    command = ["docker", "compose", "--project-directory", str(tmp_path), "config"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)
    assert resolved["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"] == values["POSTGRES_PASSWORD"]
    assert {port["host_ip"] for s in resolved["services"].values() for port in s.get("ports", [])} == {"10.0.0.5"}
    assert f"requirepass {values['VALKEY_PASSWORD']}" in resolved["configs"]["valkey"]["content"]
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=x\n")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode != 0 and "set it in .env" in refused.stderr
    assert load_settings({"LORACTL_HOME": str(tmp_path)}).s3 is None


@pytest.mark.parametrize(
    ("projects", "volumes", "hint"),
    [
        ('[{"Name":"loractl","Status":"exited(4)","ConfigFiles":"/root/.loractl/compose/compose.yaml"}]',
         "loractl_postgres", "LORACTL_HOME=/root/.loractl has them"),
        ("[]", "loractl_postgres", "the folder that has compose/.env"),
    ],
)  # fmt: skip
def test_from_another_home_it_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, projects: str, volumes: str, hint: str
) -> None:
    """An engine stands here that answers as Docker's pages say, and must not be asked to start anything."""
    engine, home = tmp_path / "docker", tmp_path / "second"
    answers = f"'compose ls'*) echo '{projects}';; 'volume ls'*) echo {volumes};; *version) ;; *) exit 3;;"
    engine.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(WrongState) as refused:
        start_containers("10.0.0.5", load_settings({"LORACTL_HOME": str(home)}))
    assert str(refused.value) == f"this machine has a lab, and {home} lacks its passwords"
    assert hint in str(refused.value.hint) and not home.exists()
    write_compose(home / "compose", "10.0.0.5")
    engine.write_text(engine.read_text().replace("/root/.loractl", str(home)))
    with pytest.raises(LoractlError, match="docker compose --project-directory ended with 3"):
        start_containers("10.0.0.5", load_settings({"LORACTL_HOME": str(home)}))
