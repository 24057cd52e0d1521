"""`npedit doctor`: versions, device, embedded weights, and nine edits with the embedded editor."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from rich.markup import escape

from npedit.cli.console import out
from npedit.cli.json_output import JsonOption, print_json, text_on_stderr
from npedit.errors import UserError

Check = tuple[str, bool, str]


def doctor(as_json: JsonOption = False) -> None:
    """Check this installation: versions, device, embedded weights, and a few edits."""
    found: list[Check] = []
    with text_on_stderr(as_json):
        for name, is_fine, words in run_checks():
            found.append((name, is_fine, words))
            out.print(f"{'[green]ok     [/]' if is_fine else '[bold red]problem[/]'} {name:<18} {escape(words)}")
    bad = sum(not is_fine for _, is_fine, _ in found)
    if as_json:
        print_json({"ok": not bad, "checks": [dict(zip(("name", "ok", "found"), check)) for check in found]})
    if bad:
        raise UserError(f"expected all checks to pass; got {bad} problems; the lines above say what to do")


def run_checks() -> Iterator[Check]:
    """Each check as (name, is it fine, what was found or what to do)."""
    yield "python", True, f"{platform.python_version()} on {platform.platform()}"
    try:
        packages = [_check_package(requirement) for requirement in required_packages()]
    except PackageNotFoundError:
        words = "not installed as a package, so what it needs is unknown; run pip install . in npedit's folder"
        packages = [("npedit", False, words)]
    yield from packages
    if not all(is_fine for _, is_fine, _ in packages):
        return
    import torch

    from npedit.nets.device import device_name, is_accelerator, pick_device
    from npedit.recipe import config

    device = pick_device()
    name = device_name(device) if is_accelerator(device) else f"{torch.get_num_threads()} threads"
    yield "device", True, f"{device.type}: {name}"
    yield _check_temporary_files()
    whole = True
    for kind in ("base", "critic", "editor"):
        try:
            folder = config.embedded_weights(kind)
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
            yield f"embedded {kind}", True, f"{size:.1f} MB in {folder}"
        except UserError as error:
            whole = False
            yield f"embedded {kind}", False, str(error)
    if whole:
        yield _check_edits()


def required_packages() -> list[Requirement]:
    """The packages that npedit needs, without those of its extras.

    Raises:
        PackageNotFoundError: npedit runs from a folder that was never installed.
    """
    found = map(Requirement, requires("npedit") or [])
    return [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]


def _check_package(need: Requirement) -> Check:
    """Whether a package is installed in a version that npedit works with."""
    try:
        found = version(need.name)
    except PackageNotFoundError:
        return need.name, False, f"not installed; install npedit again, or: pip install '{need}'"
    if not need.specifier.contains(found, prereleases=True):  # nightly builds too
        return need.name, False, f"{found}; expected {need.specifier}: pip install '{need}'"
    return need.name, True, found


def _check_temporary_files() -> Check:
    try:
        with tempfile.TemporaryDirectory() as folder:
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize / 1e9
            return "temporary files", True, f"{free:.1f} GB free in {tempfile.gettempdir()}"
    except OSError as error:
        return "temporary files", False, f"{error}; set TMPDIR to a folder that can be written"


def _check_edits() -> Check:
    """Open the embedded editor and edit nine held-out scenes."""
    from npedit.benchmarks import toy
    from npedit.editor import Editor

    try:
        start = time.monotonic()
        editor = Editor.open("embedded")
        opened = time.monotonic()
        scores = toy.score(lambda references, words: editor.edit_tensor(references, words), toy.sample_items(9))
        done = time.monotonic()
    except (UserError, RuntimeError, ValueError) as error:
        return "nine edits", False, f"{error}; reinstall npedit"
    right = round(9 * scores["both"]["value"])
    took = f"opened in {opened - start:.1f} s, {(done - opened) / 9:.2f} s an edit"
    return "nine edits", True, f"{right} of 9 right; {took}"
