"""Settings: the environment, then config.toml, then defaults; passwords are never shown."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from loractl.common.errors import UsageError
from loractl.common.settings import load_settings, redacted

from ..factories import another_person


def test_without_anything_set_all_things_lie_under_the_home(tmp_path: Path) -> None:
    settings = load_settings({"LORACTL_HOME": str(tmp_path)})
    assert settings.database_url == f"sqlite:///{tmp_path}/loractl.db"
    assert settings.artifacts_url == f"file://{tmp_path}/artifacts"
    assert settings.redis_url is None, "the embedded Valkey"
    assert settings.embedded_database
    assert {p.parent for p in (settings.runtime_dir, settings.work_dir, settings.cache_dir)} == {tmp_path}


def test_the_home_is_made_absolute_and_the_default_is_a_folder_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load_settings({}).home == tmp_path / ".loractl"
    assert load_settings({"LORACTL_HOME": "lab"}).home == tmp_path / "lab"


def test_the_environment_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('user = "file"\nredis_url = "redis://file/0"\n')
    environ = {"LORACTL_HOME": str(tmp_path), "LORACTL_USER": "environment", "LORACTL_DEVICES": ""}
    settings = load_settings(environ)
    assert (settings.user, settings.redis_url, settings.devices) == ("environment", "redis://file/0", None)


def test_an_unknown_key_in_the_file_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('databse_url = "x"\n')
    with pytest.raises(UsageError, match="unknown key databse_url") as caught:
        load_settings({"LORACTL_HOME": str(tmp_path)})
    assert caught.value.hint == "did you mean database_url?"
    (tmp_path / "config.toml").write_text("color = 1\n")
    with pytest.raises(UsageError, match="unknown key color") as caught:
        load_settings({"LORACTL_HOME": str(tmp_path)})
    known = "database_url redis_url artifacts_url devices trainer_ram store_patience user host model_roots"
    known += " trusted_code lm_eval_tasks max_row max_data lease trainer notify channels s3"
    assert caught.value.hint == f"known keys: {', '.join(known.split())}"


def test_a_trainer_s_ram_is_a_size_with_its_unit(tmp_path: Path) -> None:
    home = {"LORACTL_HOME": str(tmp_path)}
    assert load_settings(home).trainer_ram is None, "no limit"
    assert load_settings({**home, "LORACTL_TRAINER_RAM": "1.5GiB"}).trainer_ram == 3 * 2**29
    (tmp_path / "config.toml").write_text('trainer_ram = "512MiB"\n')
    assert load_settings(home).trainer_ram == 2**29
    assert load_settings({**home, "LORACTL_STORE_PATIENCE": "90s"}).store_patience_s == 90
    with pytest.raises(UsageError, match="LORACTL_STORE_PATIENCE: 'soon' is not a duration"):
        load_settings({**home, "LORACTL_STORE_PATIENCE": "soon"})
    with pytest.raises(UsageError, match="LORACTL_TRAINER_RAM: 'much' is not a size"):
        load_settings({**home, "LORACTL_TRAINER_RAM": "much"})
    for key in ("TRAINER_RAM", "MAX_ROW", "MAX_DATA"):
        with pytest.raises(UsageError, match=f"LORACTL_{key}: '0' is no room at all"):
            load_settings({**home, f"LORACTL_{key}": "0"})
    with pytest.raises(UsageError, match="LORACTL_STORE_PATIENCE: '9999d' is not between 0s and 30d"):
        load_settings({**home, "LORACTL_STORE_PATIENCE": "9999d"})


def test_a_lease_and_a_trainer_are_taken_when_they_can_be_meant(tmp_path: Path) -> None:
    home = {"LORACTL_HOME": str(tmp_path)}
    assert (load_settings(home).lease_s, load_settings(home).trainer) == (60, "loractl.worker.recipe.trainer")
    given = load_settings({**home, "LORACTL_LEASE": "6s", "LORACTL_TRAINER": "tests.chaos.trainer"})
    assert (given.lease_s, given.trainer) == (6, "tests.chaos.trainer")
    for lease in ("0", "2s", "2h"):
        with pytest.raises(UsageError, match=r"LORACTL_LEASE: .* is not between 3s and 1h"):
            load_settings({**home, "LORACTL_LEASE": lease})
    for module in ("-c", "a..b", "train.py; ls", "/tmp/x.py"):
        with pytest.raises(UsageError, match=r"LORACTL_TRAINER: .* is not a Python module"):
            load_settings({**home, "LORACTL_TRAINER": module})


def test_a_box_is_named_by_its_owner_or_like_its_machine(tmp_path: Path) -> None:
    home = {"LORACTL_HOME": str(tmp_path)}
    assert load_settings(home).host == socket.gethostname()
    assert load_settings({**home, "LORACTL_HOST": "heron.lab-2"}).host == "heron.lab-2"
    for name in ("heron:0", "two words", "x" * 65):
        with pytest.raises(UsageError, match=r"LORACTL_HOST: .* is not a host name"):
            load_settings({**home, "LORACTL_HOST": name})


@pytest.mark.parametrize("content", [b"user = ", b'user = "B\xfcro"\n'])
def test_a_file_that_is_no_toml_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.toml can't be read"):
        load_settings({"LORACTL_HOME": str(tmp_path)})


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
def test_a_postgresql_url_uses_the_driver_that_loractl_ships(tmp_path: Path, scheme: str) -> None:
    environ = {"LORACTL_HOME": str(tmp_path), "LORACTL_DATABASE_URL": f"{scheme}://lab@db/loractl"}
    settings = load_settings(environ)
    assert settings.database_url == "postgresql+psycopg://lab@db/loractl"
    assert not settings.embedded_database


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://lab:secret@db:5432/loractl", "postgresql://lab:***@db:5432/loractl"),
        ("postgresql+psycopg://lab:secret@db/loractl", "postgresql+psycopg://lab:***@db/loractl"),
        ("redis://:secret@db/0", "redis://:***@db/0"),
        ("redis://:secret@[::1]:6379/0", "redis://:***@[::1]:6379/0"),
        ("redis://:s#ec/ret@db/0", "redis://:***@db/0"),
        ("postgresql://lab:sec@ret@db/loractl", "postgresql://lab:***@db/loractl"),
        ("postgresql://lab:secret@db:port/loractl", "postgresql://lab:***@db:port/loractl"),
        ("postgresql://ada@server:secret@db/loractl", "postgresql://ada@server:***@db/loractl"),
        ("postgresql://db/loractl?user=lab&password=secret&x=1", "postgresql://db/loractl?user=lab&password=***&x=1"),
    ],
)
def test_a_password_is_hidden_wherever_it_stands_in_the_url(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////srv/loractl.db",
        "s3://bucket/lab",
        "redis://db:6379/0",
        "postgresql://lab@db:5432/x",
        "file:///a:b@c",
    ],
)
def test_a_url_without_a_password_is_shown_as_it_is(url: str) -> None:
    assert redacted(url) == url


def test_the_settings_show_no_url_by_accident(tmp_path: Path) -> None:
    environ = {
        "LORACTL_HOME": str(tmp_path),
        "LORACTL_DATABASE_URL": "postgresql://lab:hunter2@db/x",
        "LORACTL_REDIS_URL": "redis://:hunter2@db/0",
    }
    assert "hunter2" not in repr(load_settings(environ))


def test_a_user_without_a_login_name_is_called_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1234567)  # a container's user: no line in /etc/passwd
    assert load_settings({"LORACTL_HOME": str(tmp_path)}).user == "uid-1234567"


@pytest.mark.parametrize("url", ["postgresql://lab:hunter2@db:port/x", "redis://:hunter2@[::1/0", "hunter2"])
def test_an_address_that_is_no_url_is_refused_without_repeating_it(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="LORACTL_REDIS_URL is not a URL") as caught:
        load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_REDIS_URL": url})
    assert "hunter2" not in f"{caught.value.sentence}{caught.value.hint}"


@pytest.mark.parametrize(
    ("key", "urls", "hint"),
    [
        (
            "DATABASE_URL",
            ["mysql://lab:hunter2@db/x", "http://db", "postgresql+psycopg2://db/x", "sqlite:///:memory:", "sqlite://"],
            "like postgresql://USER:PASSWORD@HOST/loractl; without it SQLite in LORACTL_HOME",
        ),
        (
            "REDIS_URL",
            ["http://db", "localhost:6379", "redis://db/queue", "redis+socket://"],
            "like redis://:PASSWORD@HOST:6379/0",
        ),
        (
            "ARTIFACTS_URL",
            ["ftp://lab", "http://lab/x", "gopher://lab", "s3://", "s3:/lab/x", "file://lab/x", "file:lab", "/lab/x"],
            "like file:///lab/loractl or s3://bucket/loractl",
        ),
    ],
)
def test_an_address_of_another_kind_is_refused_with_one_that_is_right(
    tmp_path: Path, key: str, urls: list[str], hint: str
) -> None:
    for url in urls:
        with pytest.raises(UsageError, match=f"^LORACTL_{key} is not (a|the) URL") as caught:
            load_settings({"LORACTL_HOME": str(tmp_path), f"LORACTL_{key}": url})
        assert caught.value.hint == hint
        assert "hunter2" not in caught.value.sentence


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("database_url", "postgresql+psycopg:///loractl?host=/var/run/postgresql"),
        ("database_url", "sqlite:///lab.db"),
        ("redis_url", "redis://"),
        ("redis_url", "rediss://:p%40@[::1]:6380/0?ssl_ca_certs=/etc/ca.pem"),
        ("redis_url", "redis+socket:///run/valkey.sock"),
        ("redis_url", "redis+socket://:secret@/run/valkey.sock"),
        ("redis_url", "redis://:secret@db:/0"),
        ("artifacts_url", "s3://bucket"),
        ("artifacts_url", "file:///mein%20Labor"),
    ],
)
def test_an_address_of_a_known_kind_is_taken(tmp_path: Path, key: str, url: str) -> None:
    assert getattr(load_settings({"LORACTL_HOME": str(tmp_path), f"LORACTL_{key.upper()}": url}), key) == url


def test_an_endpoint_in_the_file_is_held_against_the_same_form(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[s3]\naccess_key = "a"\nsecret_key = "hunter2"\nendpoint_url = "localhost:9000"\n')
    file.chmod(0o600)
    with pytest.raises(
        UsageError, match=r"endpoint_url of \[s3\] is not the URL of an HTTP server: localhost"
    ) as caught:
        load_settings({"LORACTL_HOME": str(tmp_path)})
    assert caught.value.hint == "like http://10.0.0.5:9000"


def test_the_folders_of_base_models_are_a_list_like_path(tmp_path: Path) -> None:
    home = {"LORACTL_HOME": str(tmp_path)}
    assert load_settings(home).model_roots == ()
    named = load_settings({**home, "LORACTL_MODEL_ROOTS": "/srv/models:/data"}).model_roots
    assert named == (Path("/srv/models"), Path("/data"))
    (tmp_path / "config.toml").write_text('model_roots = "/srv/models"\n')
    assert load_settings(home).model_roots == (Path("/srv/models"),)
    with pytest.raises(UsageError, match="LORACTL_MODEL_ROOTS: models is not an absolute path"):
        load_settings({**home, "LORACTL_MODEL_ROOTS": "/srv:models"})


def test_the_folder_of_harness_tasks_is_an_absolute_path(tmp_path: Path) -> None:
    home = {"LORACTL_HOME": str(tmp_path)}
    assert load_settings(home).lm_eval_tasks is None
    assert load_settings({**home, "LORACTL_LM_EVAL_TASKS": "/srv/tasks"}).lm_eval_tasks == Path("/srv/tasks")
    with pytest.raises(UsageError, match="LORACTL_LM_EVAL_TASKS: tasks is not an absolute path"):
        load_settings({**home, "LORACTL_LM_EVAL_TASKS": "tasks"})


def test_code_is_trusted_by_model_and_commit(tmp_path: Path) -> None:
    home, commit = {"LORACTL_HOME": str(tmp_path)}, "0123456789abcdef" * 2 + "01234567"
    assert load_settings(home).trusted_code == frozenset()
    pairs = f"org/one@{commit}, org/two@{commit}"
    assert load_settings({**home, "LORACTL_TRUSTED_CODE": pairs}).trusted_code == set(pairs.split(", "))
    for wrong in ("org/one", "org/one@main", f"org/one@{commit[:7]}", f"one@{commit}", "*"):
        with pytest.raises(UsageError, match="not of the form owner/model@commit"):
            load_settings({**home, "LORACTL_TRUSTED_CODE": wrong})


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mada", "ada\u202e", "a" * 65])
def test_a_user_name_that_would_spoil_others_tables_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="LORACTL_USER: "):
        load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_USER": name})


@pytest.mark.parametrize("home", ["/dev/null", "/dev/null/below"])
def test_a_home_that_is_no_folder_is_refused(home: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_settings({"LORACTL_HOME": home})
    assert refused.value.sentence == f"LORACTL_HOME {home} can't be a folder: /dev/null is none"
    assert refused.value.hint == "name a folder of your own, like ~/.loractl"


def test_a_file_or_a_home_that_this_person_may_not_read_is_said_to_be_so(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        file = home / "config.toml"
        file.write_text('user = "ada"\n')
        for closed, mode in ((file, 0o755), (home, 0)):
            home.chmod(mode)
            file.chmod(0)
            with another_person(), pytest.raises(UsageError) as refused:
                load_settings({"LORACTL_HOME": folder})
            assert refused.value.sentence == f"{file} can't be read: Permission denied"
            assert refused.value.hint == "it is another user's; set LORACTL_HOME, or ask for the right to read it", (
                closed
            )
