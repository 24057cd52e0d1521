"""The commit of the code that makes a run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def git_revision(source: Path = Path(__file__)) -> str:
    """The commit of this package's source, with "-dirty" for changes; "" if it is not in a git repository. Nothing is
    written into the repository: a process that is killed while git writes there leaves its lock behind."""
    if shutil.which("git") is None:
        return ""
    git = ["git", "--no-optional-locks", "-C", str(source.parent)]
    if subprocess.run([*git, "ls-files", "--error-unmatch", source.name], capture_output=True).returncode:
        return ""
    ask = lambda *words: subprocess.run([*git, *words], capture_output=True, text=True).stdout.strip()  # noqa: E731
    return ask("rev-parse", "HEAD") + ("-dirty" if ask("status", "--porcelain", "--untracked-files=no") else "")
