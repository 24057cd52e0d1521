"""`npedit edit --keep-resolution`: finish edits at full size, say where that was not possible, write the masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from npedit.full_size import keep_unchanged, mask_image
from npedit.output_pictures import save_picture


class FullSize:
    """Finishes one edit after the other, in the order of `names`. `masks` is empty, or has a file for each edit; its
    picture is white where the edited image was taken and black where the original was."""

    def __init__(self, names: Sequence[str], masks: Sequence[Path], overwrite: bool, err: Console) -> None:
        self.names, self.masks, self.overwrite, self.err = names, masks, overwrite, err
        self._finished = 0

    def __call__(self, original: Image.Image, reference: Tensor, edited: Tensor) -> Image.Image:
        """The next result; see `keep_unchanged`."""
        number, self._finished = self._finished, self._finished + 1
        picture, change = keep_unchanged(original, reference, edited)
        if warning := change.warning(self.names[number]):
            self.err.print(f"[yellow]note[/] {escape(warning)}")
        if self.masks:
            mask = Image.new("L", original.size, 255) if change.is_most() else mask_image(change, original.size)
            save_picture(mask.convert("RGB"), self.masks[number], self.overwrite)
        return picture
