"""Upload an exported editor to the Hugging Face Hub, as one commit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from npedit.errors import UserError
from npedit.export.card import CARD, HUB_ID, set_repository
from npedit.export.diffusers_folder import PART_FILE, PIPELINE_FILE
from npedit.hub_access import CLIENT_ERROR
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.runs.editor_facts import FACTS_FILE

EDITOR_FILES = (FACTS_FILE, LORA_FILE, PIPELINE_FILE, "model_index.json")
EDITOR_FOLDERS = ("scheduler", "transformer")


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
    examples. Files of an earlier editor there that this one has not are deleted in the same commit.

    Raises:
        UserError: a bad id, no token, or what the Hub answers.
    """
    require_pushable(repository)
    with _explain_hub_errors(repository):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        operations = upload_operations(folder, repository)
        stale = stale_files(api.list_repo_files(repository), [operation.path_in_repo for operation in operations])
        changes: list[CommitOperationAdd | CommitOperationDelete] = [
            *operations,
            *(CommitOperationDelete(name) for name in stale),
        ]
        commit = api.create_commit(repository, changes, commit_message="Upload an editor")
    return commit.commit_url


def stale_files(present: Iterable[str], added: Iterable[str]) -> list[str]:
    """The files of a repository that belong to an editor and would be opened with the new one, such as a LoRA file
    beside a whole transformer. [] if no editor is added: files for ComfyUI may stand beside an editor."""
    present, added = sorted(present), set(added)
    if FACTS_FILE not in added:
        return []
    parts = {str(PurePosixPath(name).parent) for name in present if PurePosixPath(name).stem == PART_FILE}
    folders = {*EDITOR_FOLDERS, *parts}
    return [n for n in present if n not in added and (n in EDITOR_FILES or n.split("/")[0] in folders)]


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
