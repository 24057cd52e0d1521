"""Licences of published base models, as their authors state them, with what follows for an editor.

Facts that were read, not advice: a licence may have changed since. A model that is not in the table has to be looked up
by whoever shares the editor.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseLicence:
    """A licence as the Hub's model cards name it. `licence` is an id of the Hub ("other" with `name` and `link`),
    `consequence` what follows for an editor that was trained from the model, `source` where this was read."""

    licence: str
    consequence: str
    source: str
    name: str = ""
    link: str = ""


APACHE = (
    "The base model may be used, changed and shared, also commercially, if the licence and its notices are kept. The "
    "same holds for this editor."
)
COMMUNITY = (
    "The base model and what is derived from it, such as this editor, are free for research and non-commercial use. "
    "Commercial use is free for those with a yearly revenue of at most USD 1 million; others need an Enterprise "
    "licence. The licence must be passed on with this editor."
)
FLUX_DEV = (
    "This editor is a derivative of the base model: it may be used and shared for non-commercial purposes only, under "
    "the same licence. The licence does not count pictures as derivatives."
)
SANA = (
    "The base model is under a licence of NVIDIA, and its text encoder under the Gemma Terms of Use. Both hold for "
    "this editor. Read them before any commercial use."
)
KREA = (
    "Commercial use only below a yearly revenue of USD 1 million. The licence must be passed on with this editor, and "
    "who lets others use it must filter its content. Read the licence's rules for the names of derived models."
)


def _stability(name: str) -> BaseLicence:
    link = f"https://huggingface.co/stabilityai/{name}/blob/main/LICENSE.md"
    return BaseLicence(
        "other", COMMUNITY, "its model card; stability.ai/news/license-update", "stabilityai-ai-community", link
    )


def _sana(name: str) -> BaseLicence:
    link = f"https://huggingface.co/Efficient-Large-Model/{name}/blob/main/LICENSE.txt"
    return BaseLicence("other", SANA, "its model card", "nscl-v2-custom", link)


def _krea() -> BaseLicence:
    link = "https://huggingface.co/krea/Krea-2-Turbo/blob/main/LICENSE.pdf"
    source = "Krea 2 Community License Agreement v.1 of 22 June 2026, as cards of derived models quote it"
    return BaseLicence("other", KREA, source, "krea-2-community-license", link)


LICENCES = {
    "embedded": BaseLicence("apache-2.0", APACHE, "the licence of npedit, which the embedded models are part of"),
    "black-forest-labs/FLUX.1-dev": BaseLicence(
        "other",
        FLUX_DEV,
        "FLUX.1 [dev] Non-Commercial License",
        "flux-1-dev-non-commercial-license",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
    "black-forest-labs/FLUX.1-schnell": BaseLicence("apache-2.0", APACHE, "its model card"),
    "Qwen/Qwen-Image": BaseLicence("apache-2.0", APACHE, "its model card"),
    "Tongyi-MAI/Z-Image": BaseLicence("apache-2.0", APACHE, "its model card"),
    "Tongyi-MAI/Z-Image-Turbo": BaseLicence("apache-2.0", APACHE, "its model card"),
    "krea/Krea-2-Raw": _krea(),
    "krea/Krea-2-Turbo": _krea(),
    **{
        f"stabilityai/{name}": _stability(name)
        for name in ("stable-diffusion-3-medium-diffusers", "stable-diffusion-3.5-medium", "stable-diffusion-3.5-large")
    },
    **{
        f"Efficient-Large-Model/{name}": _sana(name)
        for name in ("Sana_1600M_1024px_diffusers", "Sana_1600M_1024px_BF16_diffusers")
    },
}


def find_licence(base: str) -> BaseLicence | None:
    """What is known of the licence of this base model (a Hub id, or "embedded"); None if nothing is known. The name of
    a local folder says nothing certain about what is in it, so a folder has no entry."""
    return LICENCES.get(base)
