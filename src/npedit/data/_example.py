"""One row with its pictures as an example."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from npedit.data import Example
from npedit.data._masks import load_keep_mask
from npedit.data._metadata import Row
from npedit.data._photos import BadImage, load_photo
from npedit.questions import IDENTITY_INSTRUCTIONS

Place = tuple[Row, str]  # a row, and the name of one of its pictures
FindPicture = Callable[[Row, str], Path | bytes]  # raises BadImage where there is none


def load_example(
    row: Row, size: tuple[int, int], find: FindPicture, references: Iterable[str], others: Iterable[Place] = ()
) -> Example:
    """A row as an example, with its pictures cropped to `size` = (H, W). `references` are the names of the further
    references that the student sees. The first of `others` that can be read, and that is not the row's own picture
    under another name, is the other photo of the subject.

    Raises:
        BadImage: the photo, a reference or the mask cannot be used.
    """
    picture = load_photo(find(row, row.file_name), size)
    more = tuple(_load_reference(find, row, name, size) for name in references)
    texts = (row.instruction, row.edit_type, row.object, row.source_caption, row.target_caption)
    mask = _load_mask(find, row, size) if row.mask else None
    return Example(row.id, picture, *texts, more, row.questions, _find_other(find, others, size, picture), mask)


def _load_reference(find: FindPicture, row: Row, name: str, size: tuple[int, int]) -> Tensor:
    try:
        return load_photo(find(row, name), size)
    except BadImage as error:
        raise BadImage(f"reference {name!r}: {error}") from error


def _load_mask(find: FindPicture, row: Row, size: tuple[int, int]) -> Tensor:
    try:
        return load_keep_mask(find(row, row.mask), find(row, row.file_name), size)
    except BadImage as error:
        raise BadImage(f"mask {row.mask!r}: {error}") from error


def _find_other(find: FindPicture, places: Iterable[Place], size: tuple[int, int], picture: Tensor) -> Tensor | None:
    """The first photo that can be read and differs from `picture`: a set may hold one photo in several rows. A broken
    photo here is no fault of the row; it is reported where it is a row's own photo."""
    for row, name in places:
        try:
            other = load_photo(find(row, name), size)
        except BadImage:
            continue
        if not torch.equal(other, picture):
            return other
    return None


def with_identity_edits(item: Example, rng: random.Random, nothing_share: float) -> Example:
    """The example; `nothing_share` of them become "do nothing" examples. A row whose only caption is the target caption
    never does: that caption describes the edit."""
    can_do_nothing = bool(item.source_caption) or not item.target_caption
    if can_do_nothing and rng.random() < nothing_share:
        return item.as_identity_edit(rng.choice(IDENTITY_INSTRUCTIONS))
    return item
