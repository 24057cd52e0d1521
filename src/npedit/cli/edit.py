"""What `npedit edit` does: check every input and output first, edit, then put all pictures in place at once. And
`npedit export`: copy an editor."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape

from npedit.editor import Editor, Facts, locate, open_picture, paired, to_rgb
from npedit.errors import UserError, did_you_mean, npedit_command

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PICTURES = {*FORMATS, ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}  # no instruction ends like this
OPTIONS = {"JPEG": {"quality": 95}, "WEBP": {"quality": 95}}


def run_edit(
    words: Sequence[str],
    instructions: Sequence[str],
    target: str,
    seed: int,
    steps: int | None,
    model: str,
    err: Console,
    tile: int | None = None,
) -> list[str]:
    """Edit the named pictures and write the results; returns a line for each.

    `words` are pictures and, where `instructions` is empty, one instruction at the end. `target` is a file, a
    folder, or "" for a file beside each picture; `tile` is that of `Editor.open`. Nothing is written unless everything
    could be read and edited.

    Raises:
        UserError: bad pictures, instructions, output or model.
    """
    paths, texts = split_arguments(words, instructions)
    pairs = paired(paths, texts)
    targets = plan(pairs, target)
    pictures = {path: to_rgb(open_picture(path)) for path in paths}
    for path in targets:
        check_writable(path)
    editor = Editor.open(model, tile=tile)
    for path, picture in pictures.items():
        if all(max(picture.size) > 2 * max(size) for size in editor.sizes) and not _blocks(picture, editor.sizes):
            sizes = ", ".join(f"{w}x{h}" for h, w in editor.sizes)
            note = f"{path} is {picture.width}x{picture.height}, but this editor works at {sizes}: detail will be lost."
            err.print(f"[yellow]note[/] {escape(note)}")
    if unknown := _unknown_words(model, texts):
        named, hints = ", ".join(map(repr, unknown)), "".join(unknown.values())
        note = f"the embedded editor never learnt {named}.{hints} See what it knows: npedit toy sheet sheet.png"
        err.print(f"[yellow]note[/] {escape(note)}")
    edited = editor.edit([pictures[p] for p, _ in pairs], [t for _, t in pairs], seed, steps)
    save_pictures(list(zip(edited, targets)))
    return [f'{source} "{text}" -> {path}' for (source, text), path in zip(pairs, targets)]


def split_arguments(words: Sequence[str], instructions: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Part the positional words into pictures and the instruction.

    Raises:
        UserError: there is no picture or no instruction.
    """
    if instructions:
        return [Path(w) for w in words], list(instructions)
    if len(words) < 2 or os.path.exists(words[-1]):  # unlike Path.exists, it does not fail on long words
        raise UserError(
            f"expected pictures and then an instruction; got only {', '.join(map(repr, words))}. "
            'Write it as: npedit edit picture.png "paint the circle red"'
        )
    if Path(words[-1]).suffix.lower() in PICTURES:
        raise UserError(
            f"expected pictures and then an instruction; there is no picture {words[-1]}. Correct its name; "
            "an instruction that ends like a picture's name is given with -i."
        )
    return [Path(w) for w in words[:-1]], [words[-1]]


def plan(pairs: Sequence[tuple[Path, str]], target: str) -> list[Path]:
    """Where each result goes: the file `target`, or names of their own in the folder `target` or beside their pictures.

    Raises:
        UserError: one file for several results, an unknown suffix, or a picture that would be overwritten.
    """
    given = Path(target)
    if target and given.suffix and not target.endswith(("/", os.sep)) and not os.path.isdir(given):
        if given.suffix.lower() not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"expected an output name ending in {known}, or a folder; got {target}. Change the ending.")
        if len(pairs) > 1:
            raise UserError(f"expected a folder for {len(pairs)} results; got the file {target}. Name a folder: out/")
        targets = [given]
    else:
        targets, taken = [], set()
        for path, _ in pairs:
            folder = given if target else path.parent
            suffix = path.suffix if path.suffix.lower() in FORMATS else ".png"
            k, name = 1, folder / f"{path.stem}-edited{suffix}"
            while name in taken:
                k, name = k + 1, folder / f"{path.stem}-edited-{k + 1}{suffix}"
            taken.add(name)
            targets.append(name)
    sources = {p.resolve() for p, _ in pairs}
    for path in targets:
        if path.resolve() in sources:
            raise UserError(f"expected an output other than the picture itself; got {path}. Choose another name.")
    return targets


def check_writable(path: Path) -> None:
    """Make the folder of `path` and try a file there, so that a bad place is told of before the work.

    Raises:
        UserError: the file cannot be written.
    """
    if os.path.isdir(path):
        raise UserError(f"expected a file to write; {path} is a folder. Give a file name in it.")
    probe = _aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"expected a place that can be written; got {path}: {error.strerror or error}.") from None


def save_pictures(results: Sequence[tuple[Image.Image, Path]]) -> None:
    """Write all pictures aside, then rename them: each file is whole, and none appears unless all could be written.

    Raises:
        UserError: one cannot be written, or its suffix is unknown.
    """
    written: list[tuple[Path, Path]] = []
    try:
        for picture, path in results:
            if path.suffix.lower() not in FORMATS:
                raise UserError(f"expected a name ending in {', '.join(FORMATS)}; got {path}. Change the ending.")
            kind, aside = FORMATS[path.suffix.lower()], _aside(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append((aside, path))
            picture.save(aside, kind, **OPTIONS.get(kind, {}))
        for aside, path in written:
            os.replace(aside, path)
    except OSError as error:
        raise UserError(f"expected to write {path}; got: {error.strerror or error}. Choose another place.") from None
    finally:
        for aside, _ in written:
            if os.path.exists(aside):
                aside.unlink()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _blocks(picture: Image.Image, sizes: Sequence[tuple[int, int]]) -> bool:
    """Is the picture a pixel-block enlargement of one of the sizes, so that nothing is lost by scaling it down?"""
    for h, w in sizes:
        if picture.height % h == 0 and picture.width % w == 0:
            small = picture.resize((w, h), Image.Resampling.NEAREST)
            if small.resize(picture.size, Image.Resampling.NEAREST).tobytes() == picture.tobytes():
                return True
    return False


def _unknown_words(model: str, texts: Sequence[str]) -> dict[str, str]:
    """Words that the embedded toy editor has no token for -> a hint at the nearest that it knows, or ""."""
    if model != "embedded":
        return {}
    from npedit.toy.words import UNKNOWN, new_tokenizer, vocabulary

    tokenizer = new_tokenizer(64, ends=False)
    known = [w for w in vocabulary() if w.isalpha()]
    words = [w.strip(".,;:!?\"'()").lower() for text in texts for w in text.split()]
    return {w: did_you_mean(w, known) for w in words if w and UNKNOWN in tokenizer.tokenize(w)}


def run_export(run: str, folder: Path) -> list[str]:
    """Copy a finished editor, whole or not at all, to a new folder; returns lines about it.

    Raises:
        UserError: there is no finished editor, or the folder is not new or cannot be written.
    """
    source = locate(run)
    facts = Facts.read(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"expected a new or empty folder; got {folder}, which is not; choose another")
    aside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, aside)
        os.replace(aside, folder)
    except OSError as error:
        raise UserError(f"expected a folder to write to; got {folder}: {error}; choose another") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [
        f"Exported to {folder}. Its base model: {facts.base}.",
        f"Use it: {npedit_command()} edit PICTURE INSTRUCTION --model {shlex.quote(str(folder))}",
    ]
