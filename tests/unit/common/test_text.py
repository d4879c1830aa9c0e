"""Text that is safe to show: passwords in URLs."""

from __future__ import annotations

import pytest

from loractl.common.errors import LoractlError
from loractl.common.text import without_passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("base_model https://ada:hunter2@hub/x is no name", "base_model https://ada:***@hub/x is no name"),
        ("https://hunter2@hub/x", "https://***@hub/x"),
        ("https:/ada:hunter2@hub/job.yaml: no such file", "https:/ada:***@hub/job.yaml: no such file"),
        (
            "GET https://a:hunter/2@hub:443/x and postgresql://:hun@ter2@db",
            "GET https://a:***@hub:443/x and postgresql://:***@db",
        ),
        (
            "postgresql://ada@server:hunter2@db and :12/x",
            "postgresql://ada@server:***@db and :12/x",
        ),
        ("redis://:12/hunter2@queue is no URL", "redis://:***@queue is no URL"),
        ("http://x?password=hunter2: refused", "http://x?password=***: refused"),
        (
            "s3.example/x?X-Amz-Signature=hunter2&a=1 of http://x?token=hunter2",
            "s3.example/x?X-Amz-Signature=***&a=1 of http://x?token=***",
        ),
    ],
)
def test_no_password_of_a_url_is_shown_in_a_sentence_or_a_hint(text: str, shown: str) -> None:
    assert without_passwords(text) == shown
    error = LoractlError(text, text)
    assert (error.sentence, error.hint) == (shown, shown)
    assert "hunter2" not in f"{error}{error.__notes__}"


@pytest.mark.parametrize(
    "text",
    [
        "ada@lab.example wrote a:b@c",
        "http://localhost:8000/owner/model@main",
        "http://127.0.0.1:9, then ada@lab.example",
        "postgresql://lab@db:5432/x",
        "postgresql://lab@db:5432/x?options=a@b",
        "file:///a:b@c",
        '{"url":"http://box:8080","mail":"ada@lab.example"}',
        "like redis://:PASSWORD@HOST:6379/0",
        '{"url":"http://box:8080",' + '"n":1,' * 1000 + '"by":"ada@lab.example"}',
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert without_passwords(text) == text
