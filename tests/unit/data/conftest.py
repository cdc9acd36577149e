import shutil

import pytest
from http_server import Server

from toolkit.data import remote


@pytest.fixture
def server(few_digits, tmp_path, monkeypatch, webdataset):
    """A few digits behind HTTP, with pauses as short as tests need; webdataset opens the URLs."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote, "STALL_S", 0.4)
    made = Server(shutil.copytree(few_digits, tmp_path / "server"))
    yield made
    made.http.shutdown()
