"""Who may reach a server: the names of this machine, and the token that a browser or a program is asked for."""

from __future__ import annotations

import base64
import secrets

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")  # names of this machine in requests
ASKING = {"WWW-Authenticate": 'Basic realm="npedit", charset="UTF-8"'}


def has_bearer_token(header: str, token: str) -> bool:
    """Whether a header `Authorization` is `Bearer TOKEN`."""
    scheme, _, given = header.partition(" ")
    return scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), token.encode())


class Password:
    """An ASGI middleware: status 401 for a request without the token. The token comes as the password of a browser's
    login, with any user name, or as `Authorization: Bearer TOKEN`."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_allowed(Headers(scope=scope).get("authorization", "")):
            refusal = PlainTextResponse("expected the server's token as the password\n", 401, ASKING)
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_allowed(self, header: str) -> bool:
        scheme, _, given = header.partition(" ")
        if scheme.lower() != "basic":
            return has_bearer_token(header, self.token)
        try:
            _, _, password = base64.b64decode(given.strip(), validate=True).partition(b":")
        except ValueError:
            return False
        return secrets.compare_digest(password.strip(), self.token.encode())
