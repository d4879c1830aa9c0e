"""The channels of config.toml: what is refused, without repeating a secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from loractl.common.channels import Channel, unknown_names
from loractl.common.errors import UsageError
from loractl.common.settings import load_settings

from ..factories import spec

KEY = "whsec_" + "a2tr" * 8


def load(home: Path, text: str, mode: int = 0o600, **environ: str) -> tuple[str, ...]:
    file = home / "config.toml"
    file.write_text(text)
    file.chmod(mode)
    settings = load_settings({"LORACTL_HOME": str(home), **environ})
    settings.require_channels()
    assert "S3CRET" not in repr(settings)
    return (*(channel.name for channel in settings.channels), *settings.notify)


def test_every_kind_is_read(tmp_path: Path) -> None:
    text = f"""
notify = "me"
[channels.hook]
kind = "webhook"
url = "https://lab.example/S3CRET"
secret = "{KEY}"
[channels.phone]
kind = "ntfy"
url = "https://ntfy.lab/S3CRET"
token = "tk_S3CRET"
users = ["ada"]
[channels.chat]
kind = "slack"
url = "https://hooks.slack.com/services/S3CRET"
lab = true
[channels.discord]
kind = "discord"
url = "https://discord.com/api/webhooks/1/S3CRET"
[channels.mail]
kind = "mail"
url = "smtp+starttls://ada:S3CRET@mail.lab:587"
from = "loractl@lab.example"
to = ["ada@lab.example"]
[channels.script]
kind = "command"
command = ["/usr/local/bin/tell", "--loud"]
"""
    assert load(tmp_path, text) == ("hook", "phone", "chat", "discord", "mail", "script", "me")
    assert load(tmp_path, text, LORACTL_NOTIFY="mail, me")[-2:] == ("mail", "me")
    with pytest.raises(UsageError, match="others can read the file"):
        load(tmp_path, text, 0o644)


def test_a_secret_may_stand_in_the_environment(tmp_path: Path) -> None:
    text = '[channels.x]\nkind = "slack"\nurl = "$LORACTL_CHANNEL_OPS"'
    file = tmp_path / "config.toml"
    file.write_text(text)
    file.chmod(0o600)
    settings = load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_CHANNEL_OPS": "https://lab/S3CRET"})
    assert settings.channels[0].url == "https://lab/S3CRET"
    (channel,) = load_settings({"LORACTL_HOME": str(tmp_path)}).channels
    assert (channel.url, channel.missing) == ("", "LORACTL_CHANNEL_OPS"), (
        "a person's command on the box works all the same"
    )
    with pytest.raises(UsageError, match="url names a variable of another kind"):
        load(tmp_path, text.replace("LORACTL_CHANNEL_OPS", "HOME"), HOME="https://lab/S3CRET")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[channels.x]\nkind = "pigeon"', "channels.x: its kind is not known"),
        ('[channels.x]\nurl = "https://S3CRET"', "channels.x: its kind is not known"),
        ('[channels.x]\nkind = "slack"', "channels.x: url is missing"),
        ('[channels.x]\nkind = "slack"\nurl = "file:///S3CRET"', "url is not an address of its kind"),
        ('[channels.x]\nkind = "slack"\nurl = "https://ada:S3CRET@lab/x"', "url is not an address of its kind"),
        ('[channels.x]\nkind = "slack"\nurl = "https://lab/S3CRET x"', "url is not an address of its kind"),
        ('[channels.x]\nkind = "slack"\nurl = "https://lab/S3CRET\\nx"', "url is not plain text"),
        ('[channels.x]\nkind = "slack"\nurl = "https://lab/S3CRET"\nhook = 1', "unknown key hook"),
        ('[channels.x]\nkind = "webhook"\nurl = "https://lab/x"\nsecret = "S3CRET"', "secret is not a webhook's"),
        ('[channels.x]\nkind = "ntfy"\nurl = "https://lab/S3CRET/x"', "url is not an address of its kind"),
        ('[channels.x]\nkind = "ntfy"\nurl = "https://lab/x"\ntoken = "S3CRET\\r\\nX: y"', "token is not plain text"),
        ('[channels.x]\nkind = "command"\ncommand = "tell S3CRET"', "command is not a list of texts"),
        ('[channels.x]\nkind = "command"\ncommand = []', "command is not a list of texts"),
        (
            '[channels.x]\nkind = "mail"\nurl = "smtp://a:S3CRET@mail.lab"\nfrom = "a@b"\nto = ["c@d"]',
            "url is not an address of its kind",
        ),
        (
            '[channels.x]\nkind = "mail"\nurl = "smtp://mail.lab"\nfrom = "a@b"\nto = ["all"]',
            "'all' is not a mail address",
        ),
        ('[channels.me]\nkind = "slack"\nurl = "https://S3CRET"', "channels.me: is not a channel name"),
        ('[channels.x]\nkind = "slack"\nurl = "https://lab/S3CRET"\nlab = "yes"', "lab is neither true nor false"),
        ('channels = "S3CRET"', "channels: is not a table of channels"),
        ('notify = "me,../x"', "'../x' is not a channel name"),
    ],
)
def test_what_is_wrong_is_named_and_no_value_repeated(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, table)
    assert message in caught.value.sentence
    assert "S3CRET" not in caught.value.sentence + (caught.value.hint or "")


def test_channels_that_can_t_be_read_stop_what_sends_alone_and_their_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('user = "ada"\n[channels.x]\nkind = "webhook"\nurl = "https://lab.example"\n')
    file.chmod(0o600)
    settings = load_settings({"LORACTL_HOME": str(tmp_path)})
    assert (settings.user, settings.channels) == ("ada", ())
    with pytest.raises(UsageError) as no:
        settings.require_channels()
    assert no.value.sentence == f"{file}: channels.x: secret is missing"


def test_a_name_that_this_machine_s_channels_lack_is_warned_of() -> None:
    phone = Channel(name="phone", kind="ntfy", users=frozenset({"ada"}))
    assert unknown_names(["me", "phone"], [phone], "ada") == []
    assert unknown_names(["me", "ops"], [], "ada") == [], "other boxes send"
    lacks = "Warning: notify: this machine's config.toml has no channel"
    assert unknown_names(["me", "ops"], [phone], "bob") == [
        f"{lacks} ops, it has phone; another box must have it.",
        f"{lacks} with bob among its users, which me means; another box must have it.",
    ]


@pytest.mark.parametrize("names", [["lab"], ["https://lab.example/x"], ["ops\nBcc: x"], ["a"] * 9], ids=str)
def test_a_job_names_channels_and_nothing_else(names: list[str]) -> None:
    with pytest.raises(ValidationError):
        spec(notify=names)
    assert spec(notify=["me", "ops"]).notify == ["me", "ops"]
