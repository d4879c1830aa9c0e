"""The databases that tests share, one after the other."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

from sqlalchemy import inspect

from loractl.common.store.database import make_engine
from loractl.common.store.store import Store

from ..databases import KeptFile
from .factories import submission


def test_a_kept_file_stays_and_is_empty_again_unless_more_than_rows_changed(
    sqlite_template: Path, tmp_path: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path)
    with closing(KeptFile(tmp_path / sqlite_template.name)) as kept:
        engine = make_engine(kept.url())
        store = Store(engine)
        for _ in range(2):
            assert store.lab.setting("changes") == "open"
            assert store.jobs.submit(submission()) == 1, "numbers begin again, too"
            assert kept.empty() and kept.url() == str(engine.url)
        assert store.lab.setting("changes") == "open"

        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE more (a int)")
        engine.dispose()
        assert not kept.empty() and kept.url() == str(engine.url)
        assert not inspect(engine).has_table("more")
        engine.dispose()
