"""Uploads to S3 that nobody has ended: which of them somebody still writes, on a real S3 and through odd gateways."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loractl.common.artifacts import ArtifactStore
from loractl.common.files import Bucket, open_files

from ... import services

BEGUN = dt.datetime(2026, 5, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
TICK = dt.timedelta(microseconds=1)


def test_an_upload_that_goes_on_was_not_killed_however_long_ago_it_began(
    s3_server: services.S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gc ended an upload of more than a day under way: 10 GB on a slow line."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = ArtifactStore(f"{s3_server.url}/{tmp_path.name}")
    files = open_files(store.url)
    bucket, key, _ = files._fs.split_path(files._at("jobs/1/attempt-1/weights"))
    where = {"Bucket": bucket, "Key": key}
    where["UploadId"] = files._fs.call_s3("create_multipart_upload", **where)["UploadId"]
    (file,) = store.unfinished(dt.datetime.now(dt.UTC) + DAY)
    begun_at = grew_at = file.changed_at
    while grew_at == begun_at:  # a server's clock may count seconds
        files._fs.call_s3("upload_part", **where, PartNumber=1, Body=b"half")
        (part,) = files._fs.call_s3("list_parts", **where)["Parts"]
        grew_at = part["LastModified"]
    assert store.unfinished(begun_at + TICK) == []
    (file,) = store.unfinished(grew_at + TICK)
    assert (file.aside, file.changed_at) == (where["UploadId"], grew_at)


class Gateway:
    """Answers of an S3 gateway, a page for each call."""

    def __init__(self, uploads: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
        self._pages = {"list_multipart_uploads": iter(uploads), "list_parts": iter(parts)}
        self.asked: list[dict[str, Any]] = []

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def call_s3(self, call: str, **asked: Any) -> dict[str, Any]:
        self.asked.append({name: value for name, value in asked.items() if name.endswith("Marker")})
        return next(self._pages[call])


def begun(*names: str) -> list[dict[str, Any]]:
    return [{"Key": f"lab/jobs/{name}", "UploadId": name, "Initiated": BEGUN} for name in names]


def grown(*days: int) -> list[dict[str, Any]]:
    return [{"PartNumber": number, "LastModified": BEGUN + day * DAY} for number, day in enumerate(days, 1)]


def unfinished(gateway: Gateway, before: dt.datetime = BEGUN + 2 * DAY) -> Iterator[str]:
    return (file.aside for file in Bucket(gateway, "bucket/lab").unfinished("jobs", before))


def test_all_pages_of_a_listing_are_asked_for_with_what_the_last_one_named() -> None:
    first = {"Uploads": begun("a"), "IsTruncated": True, "NextKeyMarker": "lab/jobs/a"}
    gateway = Gateway([{**first, "NextUploadIdMarker": "a"}, {"Uploads": begun("b")}], [{}, {}])
    assert list(unfinished(gateway)) == ["a", "b"]
    assert gateway.asked[2] == {"KeyMarker": "lab/jobs/a", "UploadIdMarker": "a"}
    gateway = Gateway([first, {"Uploads": begun("b")}], [{}, {}])
    assert list(unfinished(gateway)) == ["a", "b"]
    assert gateway.asked[2] == {"KeyMarker": "lab/jobs/a"}


def test_a_gateway_that_names_no_next_page_or_the_same_again_ends_no_gc() -> None:
    cut = {"Uploads": begun("a"), "IsTruncated": True}
    assert list(unfinished(Gateway([cut], [{}]))) == ["a"]
    same = {**cut, "NextKeyMarker": "lab/jobs/a"}
    assert list(unfinished(Gateway([same, same], [{}, {}]))) == ["a", "a"]


def test_the_newest_part_of_all_pages_says_when_an_upload_grew() -> None:
    pages = [{"Parts": grown(0, 1), "IsTruncated": True, "NextPartNumberMarker": 2}, {"Parts": grown(3)}]
    assert list(unfinished(Gateway([{"Uploads": begun("a")}], pages))) == []
    assert list(unfinished(Gateway([{"Uploads": begun("a")}], pages), BEGUN + 4 * DAY)) == ["a"]
    assert list(unfinished(Gateway([{"Uploads": begun("a")}], [{"Parts": grown(0, 1)}]))) == ["a"]


def test_an_upload_whose_newest_part_is_not_known_stays() -> None:
    cut = {"Parts": grown(0, 1), "IsTruncated": True}
    assert list(unfinished(Gateway([{"Uploads": begun("a")}], [cut]))) == []


def test_an_upload_that_was_ended_meanwhile_is_none() -> None:
    class Ended(Gateway):
        def call_s3(self, call: str, **asked: Any) -> dict[str, Any]:
            if call == "list_parts":
                raise FileNotFoundError
            return super().call_s3(call, **asked)

    assert list(unfinished(Ended([{"Uploads": begun("a")}], []))) == []
