"""Whether the Hugging Face Hub answers. Without a network the Hub's client repeats each request for about 23 seconds
before it looks for the file on this computer. With `is_local_only` it looks there at once."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

TIMEOUT = 5.0  # seconds
CLIENT_ERROR: Any = HfHubHTTPError.__mro__[1]  # the class of all errors of the HTTP client that huggingface_hub uses


def is_local_only(weights: str | Path) -> bool:
    """Whether `weights` is a Hub id and the Hub does not answer: the argument `local_files_only` of `from_pretrained`
    and `hf_hub_download`. A folder needs no request."""
    return not os.path.isdir(weights) and not is_hub_reachable(constants.ENDPOINT)


@cache
def is_hub_reachable(address: str) -> bool:
    """Whether a Hub at this address answers, with any status, within `TIMEOUT`. One request per process and address;
    no request and False in offline mode (HF_HUB_OFFLINE=1)."""
    try:
        get_session().head(address, timeout=TIMEOUT)
    except (CLIENT_ERROR, OSError):
        return False
    return True


def hub_error_text(error: Exception) -> str:
    """An error of the Hub's client in one line. The client's own text for a file that is neither reached nor on this
    computer names arguments of Python functions, so it is replaced."""
    if isinstance(error, LocalEntryNotFoundError):
        return f"{constants.ENDPOINT} does not answer, and the file was not downloaded before"
    return " ".join(str(error).split())
