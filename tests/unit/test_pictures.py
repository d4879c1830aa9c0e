"""The pictures of docs/images are those that tests.pictures takes; what they look like is for people to see."""

from __future__ import annotations

from .. import pictures

DOCS = pictures.Path(__file__).parents[2] / "docs"


def test_the_docs_have_each_picture_and_no_other() -> None:
    taken = {f"web-{name}-{shape}.png" for name in pictures.VIEWS for shape in pictures.SHAPES}
    stored = {file.name for file in (DOCS / "images").glob("web-*.png")}
    assert stored == taken
    assert all((DOCS / "images" / name).stat().st_size < 200_000 for name in stored)
    shown = (DOCS / "web.md").read_text()
    assert [name for name in sorted(taken) if f"images/{name}" not in shown] == []
