"""What `npedit edit` does: check every input and output first, then edit in bounded memory and write each result as
soon as it is ready."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape

from npedit.cli.full_size import FullSize
from npedit.data._photos import composite_on_white
from npedit.editor import Editor, pair_up
from npedit.errors import UserError, did_you_mean
from npedit.full_size import scale_back
from npedit.input_pictures import colour_conversion, open_picture, to_rgb
from npedit.output_pictures import (
    ALPHA,
    FORMATS,
    check_writable,
    require_size,
    restore_transparency,
    save_picture,
    write_to_stdout,
)
from npedit.provenance import provenance_packet, require_choice
from npedit.runs.resolve import resolve_editor

PICTURES = {*FORMATS, ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}  # no instruction ends like this
STDOUT = "-"


@dataclass(frozen=True)
class Job:
    """One picture to edit: where it is, what to change, and where the result goes (None is standard output)."""

    source: Path
    instruction: str
    target: Path | None

    def __str__(self) -> str:
        return f'{self.source} "{self.instruction}" -> {self.target or "standard output"}'


def run_edit(
    words: Sequence[str],
    instructions: Sequence[str],
    target: str,
    seed: int,
    steps: int | None,
    model: str,
    err: Console,
    tile: int | None = None,
    overwrite: bool = False,
    base: str = "",
    offload: bool = False,
    bits: int = 0,
    references: Sequence[str] = (),
    provenance: str = "editor",
    keep_resolution: bool = False,
    mask: str = "",
) -> Iterator[Job]:
    """Edit the named pictures; yields the job of each result that is written to a file.

    `words` are pictures and, where `instructions` is empty, one instruction at the end. `target` is a file, a folder,
    "-" for standard output, or "" for a free name beside each picture; `tile`, `base`, `offload` and
    `bits` are those of `Editor.open`. `references` are files of further pictures that the editor sees beside each one.
    `provenance` is what the metadata of the results say, one of `provenance.CHOICES`. With
    `keep_resolution` what an edit left unchanged is the picture's own at full size; `mask` is then a file or a folder
    for pictures of what changed. All pictures are read and all targets checked before the first is edited.

    Raises:
        UserError: bad pictures, instructions, output or model. Results written until then stay.
    """
    require_choice(provenance)
    paths, texts = split_arguments(words, instructions)
    jobs = plan_outputs(pair_up(paths, texts), target, overwrite)
    masks = plan_masks(jobs, mask, keep_resolution, overwrite)
    _check_pictures(jobs, err)
    if keep_resolution:
        _note_conversions(jobs, err)
    further = [to_rgb(open_picture(Path(name))) for name in references]
    for path in (*(job.target for job in jobs), *masks):
        if path is not None:
            check_writable(path)
    if (source := resolve_editor(model)).is_checkpoint:
        _note(err, f"using {source}")
    editor = Editor.open(model, tile=tile, base=base, offload=offload, bits=bits)
    _note_unknown_words(model, texts, err)
    reader = _Reader(jobs, () if keep_resolution else editor.sizes, err)
    finish = FullSize([str(job.source) for job in jobs], masks, overwrite, err) if keep_resolution else scale_back
    edited = editor.edit_each(reader.read_each(), [job.instruction for job in jobs], seed, steps, further, finish)
    for number, (job, picture) in enumerate(zip(jobs, edited, strict=True)):
        if original := reader.transparent.pop(number, None):
            picture = restore_transparency(picture, original)
        xmp = provenance_packet(provenance, model, source, job.instruction)
        if job.target is None:
            write_to_stdout(picture, xmp)
        else:
            save_picture(picture, job.target, overwrite, xmp)
            yield job


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


def plan_outputs(pairs: Sequence[tuple[Path, str]], target: str, overwrite: bool = False) -> list[Job]:
    """Decide where each result goes: the file `target`, names in the folder `target`, or free names beside the
    pictures.

    Raises:
        UserError: one file for several results, an unknown suffix, a picture that would be overwritten, or a file that
            exists and may not be replaced.
    """
    if target == STDOUT:
        _require_pipe(pairs)
        return [Job(path, text, None) for path, text in pairs]
    targets = _plan_files([path for path, _ in pairs], target, overwrite, "edited")
    return [Job(path, text, to) for (path, text), to in zip(pairs, targets, strict=True)]


def plan_masks(jobs: Sequence[Job], target: str, keep_resolution: bool, overwrite: bool = False) -> list[Path]:
    """Decide where the picture of each mask goes: the file `target`, or names in the folder `target`; none if it is "".

    Raises:
        UserError: a mask without `keep_resolution`, a file that is a result too, and the reasons of `plan_outputs`.
    """
    if not target:
        return []
    if not keep_resolution:
        raise UserError(f"expected --keep-resolution with --mask; got --mask {target} alone. Give both.")
    masks = _plan_files([job.source.with_suffix(".png") for job in jobs], target, overwrite, "mask")
    results = {os.path.realpath(job.target) for job in jobs if job.target is not None}
    sources = {os.path.realpath(job.source) for job in jobs}
    if taken := [path for path in masks if os.path.realpath(path) in results | sources]:
        raise UserError(
            f"expected another file for the mask than picture and result; got {taken[0]} for both; rename it."
        )
    return masks


def _plan_files(sources: Sequence[Path], target: str, overwrite: bool, ending: str) -> list[Path]:
    """A file for each source: `target`, or a name with this ending in the folder `target`, or beside the source."""
    given = Path(target)
    if target and given.suffix and not target.endswith(("/", os.sep)) and not os.path.isdir(given):
        _require_one_file(given, len(sources))
        targets = [given]
    else:
        targets = _name_outputs(sources, given if target else None, ending)
    taken = {os.path.realpath(path) for path in sources}  # unlike Path.resolve, it takes a link that leads to itself
    for path in targets:
        if os.path.realpath(path) in taken:
            raise UserError(f"expected an output other than the picture itself; got {path}. Choose another name.")
    existing = [str(path) for path in targets if os.path.isfile(path)]
    if existing and not overwrite:
        more = f" and {len(existing) - 3} more" if len(existing) > 3 else ""
        raise UserError(
            f"expected new files for the results; {', '.join(existing[:3])}{more} exist already. "
            "Choose another place, or replace them with --overwrite."
        )
    return targets


def _require_one_file(target: Path, count: int) -> None:
    if target.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"expected an output name ending in {known}, or a folder; got {target}. Change the ending.")
    if count > 1:
        raise UserError(f"expected a folder for {count} results; got the file {target}. Name a folder: out/")


def _name_outputs(sources: Sequence[Path], folder: Path | None, ending: str) -> list[Path]:
    """PICTURE-ENDING.EXT for each source, in `folder`. With None the files go beside the sources, under names that no
    file has yet."""
    names: list[Path] = []
    for source in sources:
        suffix = source.suffix if source.suffix.lower() in FORMATS else ".png"
        place = folder if folder is not None else source.parent
        k, name = 1, place / f"{source.stem}-{ending}{suffix}"
        while name in names or (folder is None and os.path.lexists(name)):
            k, name = k + 1, place / f"{source.stem}-{ending}-{k + 1}{suffix}"
        names.append(name)
    return names


def _require_pipe(pairs: Sequence[tuple[Path, str]]) -> None:
    if len(pairs) > 1:
        raise UserError(f"expected one result for standard output (-o -); got {len(pairs)}. Name a folder: -o out/")
    if sys.stdout.isatty():
        raise UserError("expected a pipe or a file for -o -; got a terminal. Write: npedit edit ... -o - > out.png")


def _check_pictures(jobs: Sequence[Job], err: Console) -> None:
    """Read every picture once and forget it, so that a bad one is reported before any work.

    Raises:
        UserError: one cannot be used, or its result does not fit its file format.
    """
    checked: dict[Path, tuple[tuple[int, int], str]] = {}
    for job in jobs:
        if job.source not in checked:
            picture = open_picture(job.source)
            checked[job.source] = picture.size, picture.mode
        size, mode = checked[job.source]
        if job.target is None:
            continue
        require_size(size, job.target)
        if mode == "RGBA" and job.target.suffix.lower() not in ALPHA:
            kept = " and ".join(sorted(ALPHA))
            _note(err, f"{job.target} cannot hold the transparency of {job.source}: laid on white. {kept} keep it.")


def _note_conversions(jobs: Sequence[Job], err: Console) -> None:
    """Say which pictures cannot be kept as their files have them."""
    found = {str(path): why for path in dict.fromkeys(job.source for job in jobs) if (why := colour_conversion(path))}
    if not found:
        return
    named = [f"{name} ({why})" for name, why in found.items()]
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    _note(err, f"converted to 8-bit sRGB: {', '.join(named[:3])}{more}. What the edit leaves unchanged equals that.")


class _Reader:
    """Reads the jobs' pictures one by one, and notes those that an editor of these sizes (H, W) loses detail of.
    `transparent` has the RGBA pictures whose results are not yet written and keep the transparency, by the job's
    number."""

    def __init__(self, jobs: Sequence[Job], sizes: Sequence[tuple[int, int]], err: Console) -> None:
        self.jobs, self.sizes, self.err = jobs, sizes, err
        self.transparent: dict[int, Image.Image] = {}

    def read_each(self) -> Iterator[Image.Image]:
        """The pictures as opaque RGB, in the jobs' order."""
        noted: set[Path] = set()
        for number, job in enumerate(self.jobs):
            picture = open_picture(job.source)
            if picture.mode == "RGBA":
                if job.target is None or job.target.suffix.lower() in ALPHA:
                    self.transparent[number] = picture
                picture = composite_on_white(picture)
            if self.sizes and job.source not in noted and _loses_detail(picture, self.sizes):
                sizes = ", ".join(f"{w}x{h}" for h, w in self.sizes)
                size = f"{picture.width}x{picture.height}"
                _note(self.err, f"{job.source} is {size}, but this editor works at {sizes}: detail will be lost.")
            noted.add(job.source)
            yield picture


def _note(err: Console, words: str) -> None:
    err.print(f"[yellow]note[/] {escape(words)}")


def _loses_detail(picture: Image.Image, sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether the picture is much larger than all of these sizes (H, W), and no pixel-block enlargement of one."""
    if any(max(picture.size) <= 2 * max(size) for size in sizes):
        return False
    for h, w in sizes:
        if picture.height % h == 0 and picture.width % w == 0:
            small = picture.resize((w, h), Image.Resampling.NEAREST)
            if small.resize(picture.size, Image.Resampling.NEAREST).tobytes() == picture.tobytes():
                return False
    return True


def _note_unknown_words(model: str, texts: Sequence[str], err: Console) -> None:
    """Say which words the embedded toy editor has no token for, with the nearest that it knows."""
    if model != "embedded":
        return
    from npedit.toy.words import UNKNOWN, new_tokenizer, vocabulary

    tokenizer = new_tokenizer(64, add_eos=False)
    known = [w for w in vocabulary() if w.isalpha()]
    words = [w.strip(".,;:!?\"'()").lower() for text in texts for w in text.split()]
    unknown = {w: did_you_mean(w, known) for w in words if w and UNKNOWN in tokenizer.tokenize(w)}
    if unknown:
        named, hints = ", ".join(map(repr, unknown)), "".join(unknown.values())
        _note(err, f"the embedded editor never learnt {named}.{hints} See what it knows: npedit toy sheet sheet.png")
