"""A lab from nothing on Debian's real packages: server box, GPU box with its service, person. In `make test-long`.

It installs PostgreSQL and Valkey in a sandbox (tests/sandbox.py); this machine stays as it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ..sandbox import SERVER, Sandbox, cannot, sandbox

ROOT = Path(__file__).parents[2]
LORACTL = Path(sys.executable).with_name("loractl")
STORE = "file:///lab/loractl"

pytestmark = [pytest.mark.long, pytest.mark.skipif(cannot() is not None, reason=f"the sandbox {cannot()}")]


@pytest.fixture(scope="module")
def machine() -> Iterator[Sandbox]:
    """A machine on which neither service was ever installed, and whose apt has the packages at hand."""
    with sandbox() as inside:
        inside.run("bash", "-c", "rm -rf /etc/apt/preferences.d /root/.loractl /etc/postgresql; chmod a+x /root")
        inside.run(
            "bash", "-c", "apt-get purge --yes 'postgresql*' 'valkey*' 'redis*'", DEBIAN_FRONTEND="noninteractive"
        )
        inside.fetch("postgresql", "valkey-server", "openssl")
        yield inside


def loractl(machine: Sandbox, home: str, *words: object, **more: object) -> subprocess.CompletedProcess[str]:
    return machine.run(LORACTL, *words, LORACTL_HOME=home, LORACTL_DEVICES="cpu", **more)  # type: ignore[arg-type]


def test_from_nothing_to_a_box_and_a_person(machine: Sandbox) -> None:
    began = time.monotonic()
    init = ("lab", "init", "--packages", "--address", SERVER, "--artifacts", STORE)
    made = loractl(machine, "/root/.loractl", *init)
    took = {"lab init": time.monotonic() - began}
    assert f"listen on {SERVER}, encrypted" in made.stdout and ", new; the roles are made" in made.stdout
    box_line, person_line = (
        line.split()[2] for line in made.stdout.splitlines() if line.startswith("    loractl join")
    )
    began = time.monotonic()
    box = machine.run(LORACTL, "join", "--name", "heron", "-", stdin=box_line + "\n", LORACTL_DEVICES="cpu")
    took["join, a box"] = time.monotonic() - began
    assert "The service is installed; systemd does not run here" in box.stdout
    began = time.monotonic()
    person = loractl(machine, "/home/ada", "join", "--name", "ada", person_line)
    took["join, a person"] = time.monotonic() - began
    print(made.stdout, box.stdout, person.stdout, took, sep="\n")
    assert person.stdout.count("ok") >= 8 and f"ada submits to the lab at {SERVER}" in person.stdout
    assert "sslmode=require&channel_binding=require" in machine.run("cat", "/home/ada/config.toml").stdout

    listed = machine.run("bash", "-c", "ls -ln /etc/loractl /etc/systemd/system/loractl-worker.service").stdout
    assert "-rw------- 1 0 0" in listed and "worker.env" in listed
    unit = machine.run("systemd-analyze", "verify", "/etc/systemd/system/loractl-worker.service")
    assert unit.stderr == ""
    refused = machine.run("runuser", "-u", "loractl", "--", "cat", "/etc/loractl/worker.env", code=1)
    assert "Permission denied" in refused.stderr, "a trainer has that user"

    worker = "set -a; . /etc/loractl/worker.env; exec runuser -u loractl -- env LORACTL_HOME=/var/lib/loractl " \
             f"HOME=/var/lib/loractl LORACTL_DEVICES=cpu {LORACTL} worker --drain-when-idle"  # fmt: skip
    assert "Serving CPU" in machine.run("bash", "-c", worker).stderr


def test_again_it_changes_no_password_and_restarts_nothing(machine: Sandbox) -> None:
    before = machine.run("bash", "-c", "cat /root/.loractl/config.toml; pgrep -f 'postgres -D|valkey-server'").stdout
    again = loractl(machine, "/root/.loractl", "lab", "init", "--packages", "--address", SERVER, "--artifacts", STORE)
    assert "the roles are there" in again.stdout
    after = machine.run("bash", "-c", "cat /root/.loractl/config.toml; pgrep -f 'postgres -D|valkey-server'").stdout
    assert after == before
    assert loractl(machine, "/home/ada", "status").stdout


def test_strangers_are_kept_out(machine: Sandbox) -> None:
    """No password, no encryption, another database: each is refused; the queue's password stands in no process list."""
    config = machine.run("cat", "/root/.loractl/config.toml").stdout
    for url in (
        f"postgresql://ada@{SERVER}/loractl", f"postgresql://ada:wrong@{SERVER}/loractl?sslmode=require",
        f"postgresql://ada:x@{SERVER}/postgres?sslmode=require", f"postgresql://ada:x@{SERVER}/loractl?sslmode=disable",
    ):  # fmt: skip
        told = loractl(machine, "/tmp/stranger", "status", code=4, LORACTL_DATABASE_URL=url)
        assert "does not let this user in" in told.stderr, url
    queue = f"redis://:x@{SERVER}:6379/0"
    told = loractl(machine, "/tmp/stranger", "doctor", "--check", "queue", "--json", code=1, LORACTL_REDIS_URL=queue)
    assert json.loads(told.stdout)["checks"][1]["level"] == "error", "it speaks TLS alone"
    listed = machine.run("bash", "-c", "ps -eo args; cat /var/log/postgresql/*.log /var/log/valkey/*.log").stdout
    secrets = [part.split("@")[0] for part in config.replace('"', "").split(":") if "@" in part]
    assert len(secrets) == 2 and not [secret for secret in secrets if secret in listed]


def test_the_health_commands_of_compose_work_on_the_packages(machine: Sandbox, tmp_path: Path) -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    health = {
        name: service["healthcheck"]["test"][1]
        for name, service in compose["services"].items()
        if "healthcheck" in service
    }
    machine.run("bash", "-c", health["postgres"])
    config = compose["configs"]["valkey"]["content"].replace("${VALKEY_PASSWORD:?set it in .env}", "compose-word")
    start = "service valkey-server stop; cat > /tmp/v.conf; valkey-server /tmp/v.conf --daemonize yes --dir /tmp"
    machine.run("bash", "-c", start, stdin=config)
    for password, code in (("compose-word", 0), ("wrong", 1)):
        for _ in range(50):
            done = machine.run("bash", "-c", health["valkey"], code=None, REDISCLI_AUTH=password)
            if done.returncode == code:
                break
            time.sleep(0.1)
        assert done.returncode == code
