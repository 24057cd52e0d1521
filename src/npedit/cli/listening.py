"""What the commands that serve pages share: the packages they need, and a socket that listens."""

from __future__ import annotations

import ipaddress
import socket

from npedit.errors import UserError


def require_page_packages() -> None:
    """Check that the packages of a page are installed.

    Raises:
        UserError: names the missing one.
    """
    try:
        import fastapi
        import gradio
        import uvicorn
    except ImportError as error:
        raise UserError(
            f"expected the packages of the extra 'serve'; got none named {error.name}; install them: "
            "pip install 'npedit[serve]'"
        ) from None
    del fastapi, gradio, uvicorn


def is_local(host: str) -> bool:
    """Whether only programs on this machine reach a server at this address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at this address.

    Raises:
        UserError: the address cannot be had.
    """
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host.strip("[]"), port))
    except OSError as error:
        made.close()
        raise UserError(
            f"expected an address to listen on; got {host}, port {port}: {error.strerror or error}. "
            "Choose another --port (0 takes a free one), or another --host."
        ) from None
    return made


def address(listening: socket.socket) -> str:
    """HOST:PORT of a listening socket, as in a URL."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
