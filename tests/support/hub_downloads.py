"""A small server on localhost from which folders are downloaded as from repositories of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "a" * 40


class _Handler(BaseHTTPRequestHandler):
    repositories: Mapping[str, Path]

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._reply()

    def do_HEAD(self) -> None:
        self._reply()

    def _reply(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.repositories.get("/".join(parts[2:4]))
            found = None if folder is None else json.dumps(_describe(folder, parts)).encode()
        else:  # USER/NAME/resolve/REVISION/FILE
            folder = self.repositories.get("/".join(parts[:2]))
            file = None if folder is None else folder.joinpath(*parts[4:])
            found = file.read_bytes() if file is not None and file.is_file() else None
        self._send(404 if found is None else 200, found or b"", "RepoNotFound" if folder is None else "EntryNotFound")

    def _send(self, status: int, content: bytes, error: str) -> None:
        self.send_response(status)
        if status == 200:
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        else:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _describe(folder: Path, parts: list[str]) -> Any:
    """What the Hub's API says about a repository: its files, as a tree or in its description."""
    files = [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in folder.rglob("*") if p.is_file()]
    if parts[4:5] == ["tree"]:
        return [{"type": "file", "path": name, "size": size, "oid": "b" * 40} for name, size in files]
    return {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name, _ in files]}


@contextmanager
def serve_repositories(repositories: Mapping[str, Path]) -> Iterator[str]:
    """The address of a server that has these folders as repositories USER/NAME."""
    handler = type("Handler", (_Handler,), {"repositories": dict(repositories)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
