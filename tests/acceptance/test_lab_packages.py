"""A lab from nothing on Debian's real packages: server box, GPU box with its service, person. In `make test-long`.

It installs PostgreSQL and Valkey in a sandbox (tests/sandbox.py); this machine stays as it is.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
import yaml

from ..sandbox import SERVER, Sandbox, cannot, sandbox

ROOT = Path(__file__).parents[2]
LORACTL = "/opt/loractl/bin/loractl"
STORE = "file:///lab/loractl"
OWNER = "/root/.loractl"

pytestmark = [pytest.mark.long, pytest.mark.skipif(cannot() is not None, reason=f"the sandbox {cannot()}")]


INSTALL = f"""
set -e
{sys.executable} -m venv --without-pip /opt/loractl
mkdir /opt/loractl/libraries
mount --bind {Path(sqlalchemy.__file__).parents[1]} /opt/loractl/libraries
cd /opt/loractl/lib/python*/site-packages
echo /opt/loractl/libraries > libraries.pth
cp -rL {ROOT}/src/loractl .
printf '#!/opt/loractl/bin/python\\nfrom loractl.scheduler.cli.main import main\\nmain()\\n' > {LORACTL}
chmod 755 {LORACTL}
"""
"""As pip would: loractl itself where deploy.md has it, its libraries from the tests' environment."""


@contextlib.contextmanager
def new_machine() -> Iterator[Sandbox]:
    """A machine on which neither service was ever installed, and whose apt has the packages at hand."""
    with sandbox() as inside:
        inside.run("bash", "-c", "rm -rf /etc/apt/preferences.d /root/.loractl /etc/postgresql; chmod a+x /root")
        inside.run(
            "bash", "-c", "apt-get purge --yes 'postgresql*' 'valkey*' 'redis*'", DEBIAN_FRONTEND="noninteractive"
        )
        inside.run("bash", "-c", INSTALL)
        inside.fetch("postgresql", "valkey-server", "openssl")
        yield inside


@pytest.fixture(scope="module")
def machine() -> Iterator[Sandbox]:
    with new_machine() as inside:
        yield inside


def loractl(machine: Sandbox, home: str, *words: object, **more: object) -> subprocess.CompletedProcess[str]:
    return machine.run(LORACTL, *words, LORACTL_HOME=home, LORACTL_DEVICES="cpu", **more)  # type: ignore[arg-type]


def test_from_nothing_to_two_boxes_and_a_person(machine: Sandbox) -> None:
    took: dict[str, float] = {}

    def timed(what: str, *words: str, home: str, **more: object) -> str:
        began = time.monotonic()
        done = loractl(machine, home, *words, **more)
        took[what] = round(time.monotonic() - began, 1)
        print(f"# loractl {' '.join(words)}\n{done.stdout}")
        return done.stdout

    lab = ("--packages", "--address", SERVER, "--artifacts", STORE)
    made = timed("lab init", "lab", "init", *lab, "--box", "heron", "--box", "owl", "--person", "ada", home=OWNER)
    assert f"listen on {SERVER}, encrypted" in made and ", new; the roles are made" in made
    heron, owl, ada = (line.split()[2] for line in made.splitlines() if line.startswith("    loractl join"))
    machine.run("systemctl", "stop", "valkey-server")
    refused = loractl(machine, OWNER, "join", "-", stdin=heron, code=1).stderr
    assert "queue: " in refused and "nothing was changed here, and the line still works" in refused
    machine.run(
        "bash", "-c", "! id loractl && ! ls /etc/loractl /var/lib/loractl /etc/systemd/system/loractl-worker.service"
    )
    machine.run("systemctl", "start", "valkey-server")
    box = timed("join, as a service", "join", "-", home=OWNER, stdin=heron + "\n")
    assert "The worker runs as a service" in box
    timed("join, another box", "join", "--no-service", owl, home="/home/owl")
    started = ("systemd-run", "-u", "owl", "-E", "LORACTL_HOME=/home/owl", "-E", "LORACTL_DEVICES=cpu")
    machine.run(*started, LORACTL, "worker")
    person = timed("join, a person", "join", ada, home="/home/ada")
    assert person.count(" ok ") >= 8 and f"ada submits to the lab at {SERVER}" in person
    assert "sslmode=require&channel_binding=require" in machine.run("cat", "/home/ada/config.toml").stdout

    boxes, deadline = "", time.monotonic() + 60
    while not ("heron: loractl" in boxes and "owl: loractl" in boxes):
        assert time.monotonic() < deadline, machine.run("journalctl", "--no-pager", "-u", "loractl-worker").stdout
        time.sleep(0.5)
        boxes = loractl(machine, "/home/ada", "doctor", "--check", "boxes").stdout
    timed("doctor", "doctor", home="/home/ada")
    print(f"seconds: {took}")
    seen = loractl(machine, OWNER, "doctor", "--service").stdout
    assert "/var/lib/loractl, as loractl" in seen and "a worker serves them" in seen


def test_the_service_is_systemd_s_and_its_passwords_are_root_s(machine: Sandbox) -> None:
    assert machine.run("systemctl", "is-enabled", "loractl-worker").stdout == "enabled\n"
    assert machine.run("systemctl", "show", "-P", "User", "loractl-worker").stdout == "loractl\n"
    listed = machine.run("ls", "-ln", "/etc/loractl").stdout
    assert "-rw------- 1 0 0" in listed and "worker.env" in listed
    assert machine.run("systemd-analyze", "verify", "/etc/systemd/system/loractl-worker.service").stderr == ""
    refused = machine.run("runuser", "-u", "loractl", "--", "cat", "/etc/loractl/worker.env", code=1)
    assert "Permission denied" in refused.stderr, "a trainer has that user"
    machine.run("systemctl", "stop", "loractl-worker", "owl")
    assert machine.run("systemctl", "is-failed", "loractl-worker", code=1).stdout == "inactive\n", "it ends well"


def test_a_second_run_changes_no_password_and_restarts_nothing(machine: Sandbox) -> None:
    before = machine.run("bash", "-c", "cat /root/.loractl/config.toml; pgrep -f 'postgres -D|valkey-server'").stdout
    again = loractl(machine, OWNER, "lab", "init", "--packages", "--address", SERVER, "--artifacts", STORE)
    assert "the roles are there" in again.stdout
    after = machine.run("bash", "-c", "cat /root/.loractl/config.toml; pgrep -f 'postgres -D|valkey-server'").stdout
    assert after == before
    assert loractl(machine, "/home/ada", "status").stdout
    by_hand = loractl(machine, OWNER, "db", "roles", "--person", "bob", "--box", "wren").stdout
    print(by_hand)
    assert "The roles already existed." in by_hand and by_hand.count("LORACTL_DATABASE_URL=postgresql://") == 2


def test_a_run_from_another_home_names_the_owner_s_and_changes_nothing(machine: Sandbox) -> None:
    seen = (
        "cat /root/.loractl/config.toml /etc/valkey/* /etc/postgresql/*/main/*.conf /etc/postgresql/*/main/conf.d/*;"
        " runuser -u postgres -- psql -c 'SELECT * FROM pg_authid' loractl; pgrep -f 'postgres -D|valkey-server'"
    )
    before = machine.run("bash", "-c", seen).stdout
    lab = ("lab", "init", "--packages", "--address", SERVER, "--artifacts", STORE)
    refused = loractl(machine, "/root/second", *lab, code=1).stderr
    assert "this machine has a lab" in refused and f"Hint: LORACTL_HOME={OWNER} has it" in refused
    assert machine.run("bash", "-c", seen).stdout == before
    machine.run("bash", "-c", "! ls /root/second/config.toml")
    assert loractl(machine, "/home/ada", "doctor", "--check", "queue").stdout
    assert loractl(machine, OWNER, "lab", "invite", "--person", "bob").stdout


def test_an_owner_who_lost_the_file_gets_a_new_password_and_nobody_else_does(machine: Sandbox) -> None:
    before = machine.run("bash", "-c", "cat /home/ada/config.toml; pgrep valkey").stdout
    machine.run("rm", f"{OWNER}/config.toml")
    again = loractl(machine, OWNER, "lab", "init", "--packages", "--address", SERVER, "--artifacts", STORE).stdout
    assert "The owner's password is new" in again
    assert machine.run("bash", "-c", "cat /home/ada/config.toml; pgrep valkey").stdout == before
    assert loractl(machine, "/home/ada", "doctor", "--check", "queue").stdout


def test_strangers_are_kept_out(machine: Sandbox) -> None:
    """No password, no encryption, another database: each is refused; the queue's password stands in no process list."""
    config = machine.run("cat", "/root/.loractl/config.toml").stdout
    for url in (
        f"postgresql://ada@{SERVER}/loractl", f"postgresql://ada:wrong@{SERVER}/loractl?sslmode=require",
        f"postgresql://ada:x@{SERVER}/postgres?sslmode=require", f"postgresql://ada:x@{SERVER}/loractl?sslmode=disable",
    ):  # fmt: skip
        told = loractl(machine, "/tmp/stranger", "status", code=4, LORACTL_DATABASE_URL=url)
        assert "refuses this user" in told.stderr, url
    queue = f"redis://:x@{SERVER}:6379/0"
    told = loractl(machine, "/tmp/stranger", "doctor", "--check", "queue", "--json", code=1, LORACTL_REDIS_URL=queue)
    assert json.loads(told.stdout)["checks"][1]["level"] == "error", "it speaks TLS alone"
    listed = machine.run("bash", "-c", "ps -eo args; cat /var/log/postgresql/*.log /var/log/valkey/*.log").stdout
    secrets = [part.split("@")[0] for part in config.replace('"', "").split(":") if "@" in part]
    assert len(secrets) == 2 and not [secret for secret in secrets if secret in listed]


def test_services_that_were_there_stay_as_they_are_until_they_are_given_away() -> None:
    lab = ("lab", "init", "--packages", "--address", SERVER, "--artifacts", STORE)
    install = "apt-get install --yes --no-install-recommends postgresql valkey-server"
    seen = "sha256sum /etc/valkey/* /etc/postgresql/*/main/*.conf; pgrep -f 'postgres -D|valkey-server'"
    with new_machine() as machine:
        machine.run("bash", "-c", install, DEBIAN_FRONTEND="noninteractive")
        machine.run("bash", "-c", "pg_ctlcluster 17 main start; service valkey-server start")
        before = machine.run("bash", "-c", seen).stdout
        refused = loractl(machine, "/root/third", *lab, code=2).stderr
        assert "PostgreSQL 17/main and valkey-server were here before: lab init would" in refused
        assert "--take-over" in refused and machine.run("bash", "-c", seen).stdout == before
        assert f"listen on {SERVER}, encrypted" in loractl(machine, "/root/third", *lab, "--take-over").stdout


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
