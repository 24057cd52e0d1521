"""What is known of published checkpoints: facts that a model's config does not state.

Every entry names its sources: documentation, issues and code of the authors and of diffusers. npedit has not opened
these weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npedit.families.base import Family


@dataclass(frozen=True)
class PublishedCheckpoint:
    """What is known of one checkpoint. An empty tuple of number types means that nothing is known against any.

    `dtypes` are the number types that the denoiser is right in, `text_and_vae_dtypes` those that text encoders and VAE
    are right in. `clips_attention`: the denoiser was trained with attention outputs that float16 clips, so they must be
    clipped in other types too. `is_step_distilled`: it was trained for a few steps at fixed times. `instead` is the Hub
    id to use in its place.
    """

    sources: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    text_and_vae_dtypes: tuple[str, ...] = ()
    clips_attention: bool = False
    is_step_distilled: bool = False
    instead: str = ""


SANA_BFLOAT16 = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
SANA_SOURCES = (
    "NVlabs/Sana, asset/docs/model_zoo.md: precision of each checkpoint",
    "NVlabs/Sana issue 47: a float16 model does not run in bfloat16, say its authors",
    "huggingface/diffusers issue 10241: the transformer must be float16 unless the checkpoint is the bfloat16 one; "
    "the VAE is float32 or bfloat16",
    "huggingface/diffusers issue 10336: attention outputs reach 1e6 and are clipped in float16 only; float32 without "
    "the clipping breaks the pictures of Sana_1600M_1024px, float32 with it does not. Applied to its sisters here",
)
SANA_FLOAT16 = PublishedCheckpoint(
    SANA_SOURCES, ("float16", "float32"), ("bfloat16", "float32"), clips_attention=True, instead=SANA_BFLOAT16
)
SANA_OF_BFLOAT16 = PublishedCheckpoint(SANA_SOURCES[:3], ("bfloat16", "float32"), ("bfloat16", "float32"))

CHECKPOINTS = {
    **{
        f"Efficient-Large-Model/Sana_{name}_diffusers": SANA_FLOAT16
        for name in (
            "600M_512px",
            "600M_1024px",
            "1600M_512px",
            "1600M_512px_MultiLing",
            "1600M_1024px",
            "1600M_1024px_MultiLing",
        )
    },
    SANA_BFLOAT16: SANA_OF_BFLOAT16,
    "Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers": SANA_OF_BFLOAT16,
    "Tongyi-MAI/Z-Image-Turbo": PublishedCheckpoint(
        ("arXiv 2511.22699: distilled to 8 steps (Decoupled-DMD, DMDR)",),
        is_step_distilled=True,
        instead="Tongyi-MAI/Z-Image",
    ),
    "black-forest-labs/FLUX.1-schnell": PublishedCheckpoint(
        ("its model card: latent adversarial diffusion distillation, 1 to 4 steps",),
        is_step_distilled=True,
        instead="black-forest-labs/FLUX.1-dev",
    ),
    "stabilityai/stable-diffusion-3.5-large-turbo": PublishedCheckpoint(
        ("its model card: adversarial diffusion distillation, 4 steps",),
        is_step_distilled=True,
        instead="stabilityai/stable-diffusion-3.5-large",
    ),
}


def find_published(weights: str | Path) -> PublishedCheckpoint | None:
    """What is known of the checkpoint with this Hub id, or in a local folder of the same name (`Z-Image-Turbo`, or
    `Tongyi-MAI--Z-Image-Turbo`). None if nothing is known."""
    if str(weights) in CHECKPOINTS:
        return CHECKPOINTS[str(weights)]
    folder = Path(weights).name
    return next((c for name, c in CHECKPOINTS.items() if folder in (name.replace("/", "--"), name.split("/")[1])), None)


def is_step_distilled(weights: str | Path, pipe_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was trained for a few steps: by what is known of it, or by its pipeline's own mark."""
    known = find_published(weights)
    return bool(known and known.is_step_distilled) or bool(pipe_config.get("is_distilled", False))


def sampling_guidance(family: Family) -> float:
    """The scale of classifier-free guidance with which a base model makes its pictures: that of its own pipeline, and 1
    (one pass, none) where the net has the scale as an input or the checkpoint is distilled to a few steps."""
    pipe: Any = family.pipe
    net_config: Any = family.base.config
    embeds_scale = bool(net_config.get("guidance_embeds"))
    if embeds_scale or is_step_distilled(str(pipe.name_or_path), pipe.config):
        return 1.0
    return family.facts.guidance
