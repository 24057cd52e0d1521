"""A real server with the embedded editor."""

import httpx
import pytest
from edit_server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("serve") / "log.txt", "--max-mib", "1", "--max-megapixels", "0.5")
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture(scope="session")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made
