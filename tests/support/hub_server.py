"""A small server on localhost that speaks the requests of an upload to the Hugging Face Hub, and keeps what it got."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

import huggingface_hub.constants
import pytest

TOKEN = "hf_secretSecretSecret"


@dataclass
class Hub:
    """What was uploaded. `refuse` is the status of every answer, 0 for a Hub that works."""

    refuse: int = 0
    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files, by sha256
    commits: int = 0
    tokens: set[str] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """The answer to a POST request."""
        if path.endswith("/api/repos/create"):
            self.created.append(json.loads(body))
            return {"url": f"{self.address}/{self.created[-1].get('organization', 'me')}/{self.created[-1]['name']}"}
        if "/preupload/" in path:
            return {"files": [self._mode(f["path"]) for f in json.loads(body)["files"]]}
        if path.endswith("/objects/batch"):
            return {"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]}
        if "/commit/" in path:
            return self._commit(body, path.split("/api/models/")[1].split("/commit/")[0])
        return {}

    def list_files(self) -> list[dict[str, Any]]:
        """The answer to a request for the tree of a repository."""
        return [{"type": "file", "path": name, "oid": "1" * 40, "size": len(c)} for name, c in self.files.items()]

    def _mode(self, name: str) -> dict[str, Any]:
        mode = "lfs" if name.endswith(".safetensors") else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.address}/objects/{wanted['oid']}"}}}

    def _commit(self, body: bytes, repository: str) -> dict[str, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        self.commits += 1
        return {
            "success": True,
            "commitUrl": f"{self.address}/{repository}/commit/1",
            "commitOid": "1" * 40,
            "hookOutput": "",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def _reply(self, status: int, body: Any, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        body = self._body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.tokens |= {token} if token else set()
        if self.hub.refuse:
            return self._reply(self.hub.refuse, {"error": f"no right to write for {token}"})
        return self._reply(200, self.hub.answer(self.path.split("?")[0], body))

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rsplit("/", 1)[-1]] = self._body()
        self._reply(200, {})

    def do_GET(self) -> None:
        if "/tree/" in self.path and not self.hub.refuse:
            return self._reply(200, self.hub.list_files())
        return self._reply(self.hub.refuse or 404, {"error": "not here"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """The Hub's client of this process talks to the server at `address`, without its own transfer protocol."""
    constants = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub's client talks to this server inside the block, with `TOKEN`. There is nothing to download."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, hub.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
