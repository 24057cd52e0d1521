"""`npedit convert`: a checkpoint of NP-Edit's public reimplementation as a run that the editor opens.

The checkpoint is one file for `torch.load`: tensors under the names of diffusers' Z-Image transformer, with the prefix
`transformer.`. That project gives the reference to the transformer as the first of two frames, so the converted config
is marked and `families/z_image.py` does the same. There are two differences from that project's sampler: the noise
between steps is drawn anew, as in its training, and the time is not rounded to bfloat16.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from npedit.errors import UserError, explain_write_errors
from npedit.families._shared import schedule_shift
from npedit.families.z_image import empty_frames_net, load_base_scheduler
from npedit.flow import few_step_times
from npedit.runs.checkpoint import write_text
from npedit.runs.editor_facts import FACTS_FILE, FORMAT

PREFIX = "transformer."
STEPS = 4
PATCH = 16  # pixels a side of one token
SIZES = (
    (512, 512),
    (576, 448),
    (448, 576),
    (640, 384),
    (384, 640),
    (512, 384),
    (384, 512),
)  # (H, W) in pixels, those of its training
CARD = """# {name}, converted

A {steps}-step image editor of the family `z_image`, its base `{base}`, trained without pairs by the public
reimplementation of NP-Edit (github.com/nupurkmr9/npedit) and converted by npedit from `{name}`.

    npedit edit --run PATH_OF_THIS_RUN picture.png "paint the circle red" -o out.png
"""


def convert(source: Path, run: Path, base: str) -> Path:
    """Write the folder `run` with `final/` from the released file `source`; returns `run`. `base` is the Z-Image model
    that the checkpoint was trained from, a Hub id or a folder.

    Raises:
        UserError: the file is not such a checkpoint, or of another base; `run` is not empty; the base does not open.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"expected a new or empty folder; got {run}, which is not; choose another")
    weights = _read_weights(source)
    try:
        net, scheduler = empty_frames_net(base), load_base_scheduler(base)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"--base: expected a Z-Image that opens; got {base!r} ({error}); correct it") from None
    _check_weights(source, weights, net)
    net.load_state_dict(weights, assign=True)
    diffusers_net: Any = net
    shift = schedule_shift(scheduler.config, SIZES[0][0] * SIZES[0][1] // PATCH**2)
    few_step = type(scheduler)(shift=shift, use_dynamic_shifting=False, stochastic_sampling=True)
    facts = {
        "format": FORMAT,
        "family": "z_image",
        "base": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
        "steps": STEPS,
        "times": [round(float(t), 6) for t in few_step_times(STEPS, shift)],
        "sizes": [list(s) for s in SIZES],
        "recipe": f"converted from {source.name}",
    }
    aside = run / "final.tmp"
    try:
        with explain_write_errors(run):
            aside.mkdir(parents=True)
            diffusers_net.save_pretrained(aside / "transformer")
            few_step.save_pretrained(aside / "scheduler")
            write_text(aside / FACTS_FILE, json.dumps(facts, indent=2) + "\n")
            write_text(aside / "README.md", CARD.format(name=source.name, steps=STEPS, base=base))
            os.rename(aside, run / "final")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return run


def _read_weights(source: Path) -> dict[str, Tensor]:
    """The tensors of the file by their names in the transformer. No code in the file is run."""
    wanted = "expected the released checkpoint, a mapping from names to tensors that torch.load reads as weights alone"
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{wanted}; there is no {source}; check the path") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        said = str(error).split("\n")[0]
        raise UserError(f"{wanted}; got {source} ({said}); download it again") from None
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()) or not found:
        kinds = (
            sorted({type(v).__name__ for v in found.values()}) if isinstance(found, Mapping) else type(found).__name__
        )
        raise UserError(
            f"{wanted}; got {source}, which holds {kinds}; give the released .pt, not a training checkpoint"
        )
    unprefixed = [str(name) for name in found if not str(name).startswith(PREFIX)]
    if unprefixed:
        raise UserError(
            f"{wanted}, each name with {PREFIX}; got {_first_names(unprefixed)} in {source}; give the released .pt"
        )
    return {name.removeprefix(PREFIX): value for name, value in found.items()}


def _check_weights(source: Path, weights: Mapping[str, Tensor], net: nn.Module) -> None:
    """Check that the weights have the names and shapes of the net and one floating-point type."""
    own = net.state_dict()
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    kinds = {str(value.dtype).removeprefix("torch.") for value in weights.values()}
    faults = {
        "lacks": sorted(own.keys() - weights.keys()),
        "has besides": sorted(weights.keys() - own.keys()),
        "has of another shape": shapes,
        "mixes types": sorted(kinds) if len(kinds) > 1 or not kinds <= {"float32", "bfloat16", "float16"} else [],
    }
    said = "; ".join(f"it {what} {_first_names(names)}" for what, names in faults.items() if names)
    if said:
        raise UserError(
            f"expected the weights of a Z-Image like the base, in one floating-point type; got {source}: {said}; give "
            "the base that it was trained from (--base), or the right file"
        )


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
