"""Without a network nothing waits for the Hub's client: one short request tells that the Hub does not answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from npedit.errors import UserError
from npedit.hub_access import is_hub_reachable, is_local_only
from npedit.runs.start import resolve_start
from npedit.scoring.encoders import Clip, Dino, MissingEncoder, open_encoder
from tests.support.hub_server import serve_hub, use_hub


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a Hub that does not answer: no process listens there. The Hub's client is not in offline mode."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        use_hub(monkeypatch, address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield address


def test_nothing_waits_for_a_hub_that_does_not_answer(no_hub: str) -> None:
    began = time.monotonic()
    for kind in (Dino, Clip):
        encoder = open_encoder(kind)
        assert isinstance(encoder, MissingEncoder) and "couldn't connect" in encoder.reason
    for name in ("runs/mistyped", "me/mine/lora.safetensors"):
        with pytest.raises(UserError, match=f"does not load: {no_hub} does not answer"):
            resolve_start(name)
    assert time.monotonic() - began < 5  # one file took 23 s


def test_the_hub_is_asked_once_and_a_folder_needs_no_request(
    no_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_local_only("me/mine") and not is_local_only(tmp_path)
    before = is_hub_reachable.cache_info()
    assert is_local_only("me/other") and is_hub_reachable.cache_info().misses == before.misses
    with serve_hub(monkeypatch) as hub:
        hub.refuse = 503  # any answer shows that the Hub can be reached
        assert not is_local_only("me/mine")


def test_a_transformer_that_was_downloaded_before_is_found_without_the_hub(no_hub: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--me--mine" / "snapshots" / ("1" * 40)
    (snapshot / "transformer").mkdir(parents=True)
    (snapshot / "transformer" / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1" * 40)
    assert resolve_start("me/mine").path == snapshot / "transformer"
