"""`npedit serve` as a process: addresses, tokens, signals."""

import io
import os
import re
import signal
import socket
import sys
import threading

import httpx
import pytest
from edit_server import Server
from PIL import Image

from npedit.cli.listening import is_local, listen
from npedit.cli.serve import read_token
from npedit.errors import UserError

TOKEN = "0123456789abcdef0"


def test_which_addresses_are_local():
    assert all(is_local(host) for host in ("127.0.0.1", "127.3.0.1", "localhost", "::1", "[::1]"))
    assert not any(is_local(host) for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"))


def test_other_machines_need_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv("NPEDIT_SERVE_TOKEN", raising=False)
    assert read_token("127.0.0.1", None) == ""
    with pytest.raises(UserError, match="NPEDIT_SERVE_TOKEN"):
        read_token("0.0.0.0", None)
    monkeypatch.setenv("NPEDIT_SERVE_TOKEN", TOKEN)
    assert read_token("0.0.0.0", None) == TOKEN
    (tmp_path / "token").write_text("short\n")
    with pytest.raises(UserError, match="16 characters") as told:
        read_token("0.0.0.0", tmp_path / "token")
    assert "short" not in str(told.value).replace("shorter", "")
    with pytest.raises(UserError, match="token-file"):
        read_token("0.0.0.0", tmp_path / "none")


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port"):
            listen("127.0.0.1", taken.getsockname()[1])


def picture():
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_what_waits_and_the_token_is_asked_for(tmp_path, number):
    other = number == signal.SIGINT and sys.platform == "linux"  # where all of 127.0.0.0/8 is this machine
    host = "127.0.0.2" if other else "127.0.0.1"
    server = Server(tmp_path / "log", "--host", host, env={**os.environ, "NPEDIT_SERVE_TOKEN": TOKEN})
    url, sent = f"{server.url}/v1/edits", {"instruction": "paint it red", "steps": "16"}
    assert httpx.post(url, files={"image": picture()}, data=sent).status_code == 401
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    headers, answers = {"Authorization": f"Bearer {TOKEN}"}, []

    def ask(seed):
        answers.append(
            httpx.post(url, files={"image": picture()}, data={**sent, "seed": seed}, headers=headers, timeout=60)
        )

    threads = [threading.Thread(target=ask, args=[str(i)]) for i in range(6)]
    for thread in threads:
        thread.start()
    while len(answers) + _edits_in_progress(server, headers) < 6 and any(t.is_alive() for t in threads):
        pass  # a connection that the server has not read from when the signal comes is closed, as by any server
    assert server.stop(number) == 128 + number
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 6
    assert TOKEN not in server.log.read_text()


def _edits_in_progress(server, headers):
    """How many edits the server has begun to read and not answered; the request that asks is one in progress too."""
    figures = httpx.get(f"{server.url}/metrics", headers=headers).text
    return int(float(re.search(r"^npedit_requests_in_progress (\S+)$", figures, re.MULTILINE)[1])) - 1
