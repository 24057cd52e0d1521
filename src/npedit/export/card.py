"""The model card of an exported editor: README.md, whose head the Hugging Face Hub reads.

Every statement comes from a file: the folder's npedit.json, the recipe of the run, the prepare.json of its data, the
results of evaluations. What no file says, the card says to be unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from npedit.export.base_licences import BaseLicence, find_licence
from npedit.export.diffusers_folder import PIPELINE_FILE, dtype_source
from npedit.export.measured_scores import MeasuredScore, find_scores, last_evaluation, read_scores
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.recipe.config import Recipe, find_class
from npedit.runs.checkpoint import has_seen_pairs
from npedit.runs.editor_facts import FACTS_FILE
from npedit.runs.editor_weights import read_recipe
from npedit.runs.files import read_json_object
from npedit.runs.final import public_name, read_set_facts, rights_lines
from npedit.runs.resolve import EditorSource
from npedit.scoring.tables import markdown_table

CARD = "README.md"
PLACE = "USER/NAME"
NO_PAIRS = "no-pairs"  # a tag
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
UNKNOWN = "unknown"  # the Hub's id for a licence that is not stated


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from. `folder` is the exported folder, `editor` its npedit.json; `recipe` is None for an
    editor without a run. `earlier` is the card that came with such an editor, "" if there was none."""

    folder: Path
    editor: Mapping[str, Any]
    recipe: Recipe | None
    without_pairs: bool | None  # None: not known
    scores: Sequence[MeasuredScore]
    earlier: str = ""

    @property
    def base(self) -> str:
        """The base model's Hub id, "embedded", or the last part of its folder's path."""
        return public_name(str(self.editor["base"]))

    @property
    def has_lora(self) -> bool:
        """Whether the editor is a LoRA file."""
        return (self.folder / LORA_FILE).is_file() or (self.folder / "loras").is_dir()  # the latter for ComfyUI

    @property
    def title(self) -> str:
        """The editor's name."""
        return self.recipe.name if self.recipe else str(self.editor.get("recipe") or self.folder.name)


def model_card(folder: Path, source: EditorSource, editor: Mapping[str, Any] | None = None) -> str:
    """The text of README.md for an exported folder. `source` is where the editor was found; `editor` are the facts of
    npedit.json if the folder has no such file. The place on the Hub is `PLACE` until `set_repository` fills it in.

    The card of an editor without a run keeps what the card that came with it said about training and scores.

    Raises:
        UserError: the run's recipe is damaged.
    """
    editor = read_json_object(folder / FACTS_FILE) if editor is None else editor
    recipe = read_recipe(source) if source.run else None
    without_pairs = has_seen_pairs(recipe, source.run) is False if recipe else None
    measured, earlier = read_scores(find_scores(source), editor["steps"]), ""
    if recipe is None and (source.folder / CARD).is_file():
        earlier = (source.folder / CARD).read_text(encoding="utf-8")
        without_pairs = True if NO_PAIRS in (_read_head(earlier).get("tags") or []) else None
    if recipe and source.run:
        measured += last_evaluation(source.run, recipe, source.update)
    return write_card(CardFacts(folder, editor, recipe, without_pairs, measured, earlier))


def _read_head(card: str) -> dict[str, Any]:
    """The YAML block of a card; {} if it has none."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.S)
    found = yaml.safe_load(match[1]) if match else None
    return found if isinstance(found, dict) else {}


def _section(card: str, title: str) -> str:
    """The text below a heading of the second level, "" if there is none."""
    match = re.search(rf"^## {title}\n+(.*?)(?=^## |\Z)", card, re.M | re.S)
    return match[1].rstrip() + "\n" if match else ""


def set_repository(card: str, repository: str) -> str:
    """The card with the editor's place on the Hub, USER/NAME, in its examples."""
    return card.replace(PLACE, repository)


def write_card(facts: CardFacts) -> str:
    """The card as text."""
    parts = (_head, _intro, _use_text, _training_text, _score_text, _limit_text, _licence_text)
    return "\n".join(part(facts) for part in parts)


def _head(facts: CardFacts) -> str:
    """The YAML block that the Hub reads."""
    licence = find_licence(facts.base)
    head: dict[str, Any] = {"license": licence.licence if licence else UNKNOWN}
    if licence and licence.name:
        head |= {"license_name": licence.name, "license_link": licence.link}
    if _is_hub_id(str(facts.editor["base"])):
        head |= {"base_model": facts.base, "base_model_relation": "adapter" if facts.has_lora else "finetune"}
    tags = ["image-editing", "npedit", str(facts.editor["family"])]
    tags += (["lora"] if facts.has_lora else []) + ([NO_PAIRS] if facts.without_pairs else [])
    head |= {"library_name": "diffusers" if _has_pipeline(facts) else "npedit"}
    head |= {"pipeline_tag": "image-to-image", "tags": tags}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def _is_hub_id(base: str) -> bool:
    return bool(HUB_ID.fullmatch(base)) and not Path(base).is_dir()


def _has_pipeline(facts: CardFacts) -> bool:
    return (facts.folder / PIPELINE_FILE).is_file()


def _intro(facts: CardFacts) -> str:
    kind = "a LoRA adapter of" if facts.has_lora else "a transformer that was trained from"
    sizes = ", ".join(f"{w}x{h}" for h, w in facts.editor["sizes"])
    return (
        f"# {facts.title}: an image editor\n\n"
        f"A {facts.editor['steps']}-step image editor of the family `{facts.editor['family']}`: {kind} "
        f"`{facts.base}`. It takes a picture and an instruction. Working sizes (width x height): {sizes}.\n"
    )


# ---------------------------------------------------------------------------------------------------------------- use


def _use_text(facts: CardFacts) -> str:
    if not (facts.folder / FACTS_FILE).is_file():
        return f"## Use\n\n### ComfyUI\n\n{_comfyui_text(facts)}"
    return (
        "## Use\n\n### npedit\n\n"
        f'```sh\nhf download {PLACE} --local-dir editor\nnpedit edit picture.png "INSTRUCTION" --model editor\n```\n\n'
        f"### diffusers\n\n{_diffusers_text(facts)}\n### ComfyUI\n\n{_comfyui_text(facts)}"
    )


def _diffusers_text(facts: CardFacts) -> str:
    if _has_pipeline(facts):
        return (
            "```python\nimport torch\nfrom diffusers import DiffusionPipeline\nfrom PIL import Image\n\n"
            # Without a number type transformers opens its parts in that of their files, and diffusers in float32.
            f'pipe = DiffusionPipeline.from_pretrained(\n    "{PLACE}", custom_pipeline="{PLACE}", '
            f"trust_remote_code=True,\n    torch_dtype={dtype_source(facts.editor)},\n)\n"
            'generator = torch.Generator("cpu").manual_seed(0)\n'
            'image = Image.open("picture.png")\n'
            f'pipe(image=image, prompt="INSTRUCTION", num_inference_steps={facts.editor["steps"]}, '
            "generator=generator).images[0]\n```\n"
        )
    if facts.has_lora and find_class("families", str(facts.editor["family"])).has_wider_input:
        return (
            f"`{LORA_FILE}` is for a transformer with a wider input than the base model's. The base's own pipeline "
            "cannot load this file. Export the editor with `npedit export --as diffusers`.\n"
        )
    weights = f"`load_lora_weights` opens `{LORA_FILE}`" if facts.has_lora else "`transformer/` opens"
    return (
        f"{weights} in the base model's own pipeline, but that pipeline takes no reference picture. "
        "`npedit export --as diffusers` writes a pipeline that does.\n"
    )


def _comfyui_text(facts: CardFacts) -> str:
    if (facts.folder / "workflow.json").is_file():
        return (
            "Copy `custom_nodes` into ComfyUI's folder and `loras` or `diffusion_models` into its folder `models`. "
            "Then open `workflow.json`.\n"
        )
    return "This folder has no files for ComfyUI; `npedit export --as comfyui` writes them.\n"


# ----------------------------------------------------------------------------------------------------------- training


def _training_text(facts: CardFacts) -> str:
    if facts.earlier:
        return f"## Training\n\n{_section(facts.earlier, 'Training') or _short_card_text(facts.earlier)}"
    return f"## Training\n\n{_pairs_text(facts)}\n{_recipe_text(facts.recipe)}{_data_text(facts.recipe)}"


def _short_card_text(card: str) -> str:
    """What the short card of `runs/final.py` says about training: its text between the title and "Use"."""
    match = re.search(r"^# [^\n]*\n+(.*?)(?=^## |\Z)", card, re.M | re.S)
    return match[1].rstrip() + "\n" if match else ""


def _pairs_text(facts: CardFacts) -> str:
    if facts.without_pairs:
        return "No pairs were used: training saw no edited image.\n"
    if facts.recipe is None or not facts.recipe.is_trained_with_pairs():
        return "Whether training saw edited images (pairs) is not known from the files of this editor.\n"
    return "Training saw edited images (pairs).\n"


def _recipe_text(recipe: Recipe | None) -> str:
    if recipe is None:
        return "The run of this editor was not found, so its recipe is not stated here.\n"
    critic = recipe.critic
    judged = f"`{critic.name}`, `{public_name(critic.weights)}`" if critic else "none"
    stages = "".join(f"- `{s.step}`: {s.updates} updates of {s.batch_size * s.accumulate}\n" for s in recipe.stages)
    start = f"Started from: `{public_name(recipe.start)}`.\n" if recipe.start else ""
    return f"Critic (a vision-language model that judged the edits): {judged}. Seed: {recipe.seed}.\n{start}\n{stages}"


def _data_text(recipe: Recipe | None) -> str:
    """Licences and sources of the photos, and the models that wrote the instructions, from prepare.json."""
    if recipe is None:
        return ""
    facts = read_set_facts(recipe)
    lines = [f"\nData source: `{recipe.data.name}`.\n"]
    lines += rights_lines(facts) or ["Licences and sources of the training photos are not stated in the data.\n"]
    for title, key in (("Instructions were written by", "writer"), ("They were verified by", "verifier")):
        model = facts.get(key)
        if isinstance(model, dict) and model.get("name"):
            lines.append(f"{title} `{public_name(str(model['name']))}`.\n")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- scores, limits, licence


def _score_text(facts: CardFacts) -> str:
    if not facts.scores and (kept := _section(facts.earlier, "Scores")):
        return f"## Scores\n\n{kept}"
    if not facts.scores:
        return "## Scores\n\nNo measured scores were found with this editor.\n"
    rows = [(s.benchmark, s.metric, f"{s.value:.3f}", s.interval(), s.items) for s in facts.scores]
    head = ("benchmark", "metric", "value", "95 % interval", "items")
    return "\n".join(["## Scores\n", *markdown_table(head, rows), ""])


def _limit_text(facts: CardFacts) -> str:
    return (
        "## Limits\n\n"
        "- The editor works at the sizes above. A picture of another size is scaled; fine detail is lost.\n"
        f"- It was trained for {facts.editor['steps']} steps. Other numbers of steps were not trained.\n"
        "- It can do what its training instructions asked for, as far as the base model can draw it. A critic that is "
        "a model makes mistakes, and the editor may have learnt them.\n"
        "- Nobody measured here how it treats people, brands or harmful instructions.\n"
    )


def _licence_text(facts: CardFacts) -> str:
    licence: BaseLicence | None = find_licence(facts.base)
    if licence is None:
        return (
            f"## Licence\n\nnpedit does not know the licence of the base model `{facts.base}`. The editor is derived "
            "from that model: look up the licence of that model before you share or use the editor.\n"
        )
    name = f"[{licence.name}]({licence.link})" if licence.link else licence.licence
    return (
        f"## Licence\n\nBase model: {name} (read in: {licence.source}). {licence.consequence}\n"
        "\nThe licences of the training photos are a separate matter: see above.\n"
    )
