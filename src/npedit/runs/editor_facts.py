"""What an editor's folder says about it: `npedit.json`. For a checkpoint the same facts come from its run's recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from npedit.errors import UserError
from npedit.recipe import config

FORMAT = 1
FACTS_FILE = "npedit.json"


@dataclass(frozen=True)
class EditorFacts:
    """`sizes` are (height, width) in pixels; `base` is a Hub id, a folder or "embedded"; `tile` is the side in pixels
    of the tiles that pictures were decoded in during training, 0 for whole pictures. `text_dtype` and `vae_dtype` are
    "" where they equal `dtype`, the denoiser's number type. `isolated_references` says that references attend to
    themselves alone."""

    family: str
    base: str
    steps: int
    sizes: tuple[tuple[int, int], ...]
    dtype: str = "float32"
    tile: int = 0
    text_dtype: str = ""
    vae_dtype: str = ""
    isolated_references: bool = False

    def dtypes(self) -> dict[str, torch.dtype]:
        """The number type of each part, as `Family.load` takes it.

        Raises:
            KeyError: npedit.json names an unknown type.
        """
        return config.part_dtypes(self.dtype, self.text_dtype, self.vae_dtype)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check a folder's `npedit.json`.

        Raises:
            UserError: it is missing, is not JSON, is of another format, or lacks a field.
        """
        path = folder / FACTS_FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"expected {FACTS_FILE} in {folder}; there is none. Give a run, its final/ folder, or 'embedded'."
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                f"expected JSON in {path}; got: {error}. Export the run again: npedit export RUN DIR."
            ) from None
        try:
            if found["format"] != FORMAT:
                raise UserError(
                    f"expected an editor of format {FORMAT} in {path}; got {found['format']}; update npedit."
                )
            sizes = tuple((int(h), int(w)) for h, w in found["sizes"])
            family, base, steps = str(found["family"]), str(found["base"]), int(found["steps"])
            facts = cls(
                family, base, steps, sizes, found.get("dtype", "float32"), int(found.get("tile", 0)),
                found.get("text_dtype", ""), found.get("vae_dtype", ""), bool(found.get("isolated_references", False)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"expected format, family, base, steps and sizes in {path}; got a bad one: {error!r}. "
                "Export the editor again, or correct the file"
            ) from None
        if facts.steps < 1 or facts.tile < 0 or not sizes or min(min(s) for s in sizes) < 1:
            got = f"{facts.steps} steps, tile {facts.tile}, sizes {sizes}"
            raise UserError(f"expected steps >= 1, tile >= 0 and sizes >= 1 in {path}; got {got}. Correct the file")
        return facts

    @classmethod
    def from_recipe(cls, recipe: config.Recipe) -> Self:
        """The facts of an editor that this recipe trains, as `final/` will hold them.

        Raises:
            UserError: its data do not open, where only they know the sizes.
        """
        settings = recipe.data.settings
        if hasattr(settings, "sizes"):
            sizes = settings.sizes
        else:
            sizes = config.find_module("data", recipe.data.name).Source(settings, recipe.seed).sizes
        sizes = tuple((int(h), int(w)) for h, w in sizes)
        chosen, tile = recipe.family, recipe.memory.decode_tile
        return cls(
            chosen.name, chosen.weights, recipe.trainer.steps, sizes, chosen.dtype, tile, chosen.text_dtype,
            chosen.vae_dtype, chosen.isolated_references,
        )  # fmt: skip
