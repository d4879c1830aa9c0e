"""The servers of a run: none outlives it."""

from __future__ import annotations

import pytest
from redis import ConnectionError, Redis

from .. import services


@pytest.mark.usefixtures("real_services")
def test_a_server_that_nobody_has_ended_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with services.run_folder(None) as folder:
        monkeypatch.setenv(services.RUN, str(folder))
        url = services.start_valkey(folder)
        assert Redis.from_url(url).ping()
    with pytest.raises(ConnectionError):
        Redis.from_url(url).ping()
    assert not folder.exists()
