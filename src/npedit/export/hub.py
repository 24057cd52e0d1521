"""Upload an exported editor to the Hugging Face Hub, as one commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from npedit.errors import UserError
from npedit.export.card import CARD, HUB_ID, set_repository
from npedit.hub_access import CLIENT_ERROR


def require_pushable(repository: str) -> None:
    """Check the id of a repository, and that there is a token to write with, before any work.

    Raises:
        UserError: the id is not USER/NAME, or this computer has no token.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(
            f"expected a repository USER/NAME; got {repository!r}: {str(error).rstrip('.')}; correct it"
        ) from None
    if not HUB_ID.fullmatch(repository):
        raise UserError(f"expected a repository USER/NAME; got {repository!r}; put your user name before the name")
    if not get_token():
        raise UserError(
            "expected a token of the Hugging Face Hub with the right to write; found none; log in with "
            "'hf auth login', or set HF_TOKEN"
        )


def push_to_hub(folder: Path, repository: str, private: bool = False) -> str:
    """Upload the files of a folder, without hidden ones, to the repository USER/NAME, which is made if there is none;
    returns the address of the commit. `private` counts for a new repository only. The card names the repository in its
    examples.

    Raises:
        UserError: a bad id, no token, or what the Hub answers.
    """
    require_pushable(repository)
    with _explain_hub_errors(repository):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, upload_operations(folder, repository), commit_message="Upload an editor")
    return commit.commit_url


def upload_operations(folder: Path, repository: str) -> list[CommitOperationAdd]:
    """The files of a folder, without hidden ones, as operations of a commit. The card has the repository's id in the
    place of USER/NAME."""
    operations = []
    for name in _file_names(folder):
        content: Path | bytes = folder / name
        if _is_hidden(name):
            continue
        if name == CARD:
            content = set_repository((folder / name).read_text(encoding="utf-8"), repository).encode("utf-8")
        operations.append(CommitOperationAdd(name, content))
    return operations


def hidden_files(folder: Path) -> list[str]:
    """The files of a folder that are not uploaded: their name, or that of a folder that they are in, begins with a
    dot. An export writes none."""
    return [name for name in _file_names(folder) if _is_hidden(name)]


def _file_names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


@contextmanager
def _explain_hub_errors(repository: str) -> Iterator[None]:
    """Turn an error of the Hub's client into a `UserError` without the token."""
    try:
        yield
    except (CLIENT_ERROR, OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        if token := get_token():
            text = text.replace(token, "(token)")
        raise UserError(
            f"expected to write to {repository} on the Hugging Face Hub; got: {text}; check the id, your rights there, "
            "and the connection"
        ) from None
