"""Strict, typed recipes in YAML. A name in a recipe is a file name: `step: np_edit` is `steps/np_edit.py`.

A setting is defined in the class that reads it. The keys under `data` are checked by the class `Settings` of the named
file in `data/`, and a stage's `settings` by the `Settings` of its step. An unknown key is an error that names the
nearest known key.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from npedit.errors import UserError, did_you_mean
from npedit.recipe._dtypes import require_trainable_dtypes
from npedit.recipe.overrides import apply_override
from npedit.recipe.packaged import recipe_path
from npedit.recipe.yaml_file import parse_yaml

KINDS = ("families", "critics", "steps", "data", "benchmarks")
BASES = {"families": "Family", "critics": "Critic", "steps": "Step"}
EMBEDDED = "embedded"


class Settings(BaseModel):
    """The base class of all settings. Instances are frozen; an unknown key and a number that is not finite are
    errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FamilyChoice(Settings):
    """Which text-to-image model is trained. `weights` is a folder, a Hub id, or "embedded". `dtype` is the number type
    of the denoiser; `text_dtype` and `vae_dtype` are those of the text encoders and of the VAE, "" is `dtype`. With
    `isolated_references` the references attend to themselves alone, and one pass over them serves all steps."""

    name: str
    weights: str = EMBEDDED
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    text_dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    vae_dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    isolated_references: bool = False

    def dtypes(self) -> dict[str, torch.dtype]:
        """The number type of each part, as `Family.load` takes it."""
        return part_dtypes(self.dtype, self.text_dtype, self.vae_dtype)

    def folder(self) -> str | Path:
        """The weights to open; "embedded" becomes the package's own folder."""
        return embedded_weights("base") if self.weights == EMBEDDED else self.weights


class CriticChoice(Settings):
    """A vision-language model, as critic or as judge. `resolution` is the side in pixels of the pictures that it gets
    (0: the model's usual one); a model with a single resolution refuses any other when its weights are opened. `bits`
    is 8 or 4 to quantise most weights (CUDA with bitsandbytes), 0 to keep all in `dtype`."""

    name: str
    weights: str = EMBEDDED
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    resolution: int = Field(0, ge=0)
    bits: Literal[0, 4, 8] = 0
    wording: Literal["plain", "short"] = "plain"

    def folder(self) -> str | Path:
        """The weights to open; "embedded" becomes the package's own folder."""
        return embedded_weights("critic") if self.weights == EMBEDDED else self.weights


class LoraChoice(Settings):
    """Student and fake score as LoRA adapters of one frozen base model, instead of full fine-tuning."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(16.0, gt=0)  # an adapter's output is scaled by alpha / rank


class MemorySettings(Settings):
    """What is traded for memory or time. `cached_prompts` and `cached_latents` are how many encoded prompts and encoded
    pictures are kept, in the CPU's memory; with any, each is encoded by itself, so that a resumed run, whose cache is
    empty, repeats itself. Latents help where the same pictures come again: photos in their later passes, and nothing
    that is drawn anew. `families/_decode.py` says what tiles change; the finished editor decodes in them too."""

    gradient_checkpointing: bool = False  # student and fake score compute their blocks again in the backward pass
    offload: bool = False  # text encoders, VAE and critic are in the CPU's memory while nobody uses them
    cached_prompts: int = Field(0, ge=0)
    cached_latents: int = Field(0, ge=0)
    decoder_checkpointing: bool = False  # the VAE's decoder computes its blocks again in the critic's backward pass
    critic_checkpointing: bool = False  # the critic computes its layers again in its backward pass
    packed_questions: bool = False  # the critic is asked all questions about the same pictures in one row of tokens
    decode_tile: int = Field(0, ge=0)  # side in pixels of the overlapping tiles of decoding; 0: no tiles


class DataChoice(Settings):
    """The source of training data. In YAML, its settings are keys beside the name."""

    name: str
    settings: SerializeAsAny[Settings]


class Stage(Settings):
    """One training method for a number of updates. The gradients of `accumulate` batches of `batch_size` items are
    added up for one update. `batch_size` is global: the processes share each batch."""

    step: str
    updates: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    accumulate: int = Field(1, ge=1)
    settings: SerializeAsAny[Settings]


class FailureSampling(Settings):
    """Which items come more often: those that the critic still finds wrong. An item's weight is `floor` + (1 - `floor`)
    x its error, which is the running mean of 1 - p(wanted answer)."""

    floor: float = Field(0.25, gt=0, le=1)  # weight of an item without error; 1 is that of one with p = 0
    every: int = Field(25, ge=1)  # updates between two changes of the weights


class TrainerSettings(Settings):
    """How often the trainer makes samples, evaluates and saves, in updates. With 0, samples are made at the start and
    the end of the run, and evaluations at the start and at the end of each stage."""

    sample_every: int = Field(500, ge=0)
    sample_items: int = Field(8, ge=1, le=64)
    evaluate_every: int = Field(500, ge=0)
    evaluate_items: int = Field(90, ge=1)
    benchmark: str = ""  # a file in benchmarks/, or "" for none
    save_every: int = Field(500, ge=0)
    save_seconds: float = Field(60.0, gt=0)  # a run that is killed loses at most this much work
    keep: int = Field(2, ge=1)  # checkpoints
    steps: int = Field(4, ge=1, le=64)  # of the few-step editor
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # services that metrics are sent to as well
    by_failure: FailureSampling | None = None  # None: items are drawn whatever the critic says of them
    shard: Literal["none", "full", "hybrid"] = "none"  # of trained models: over all processes, or within each machine


class Recipe(Settings):
    """A whole training run. Built by `load_recipe` or `make_recipe`."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    family: FamilyChoice
    start: str = ""  # the editor that the student starts from, as `resolve_editor` finds it; "" is the base model
    lora: LoraChoice | None = None  # None: full fine-tuning of student and fake score
    critic: CriticChoice | None = None  # None: allowed if no stage needs a critic
    judge: CriticChoice | None = None  # a second critic for evaluation only; it gives no gradient
    data: DataChoice
    stages: tuple[Stage, ...] = Field(min_length=1)
    trainer: TrainerSettings = TrainerSettings()
    memory: MemorySettings = MemorySettings()

    def as_dict(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain YAML values; `make_recipe` reads it back."""
        out = self.model_dump(mode="json")
        data = out.pop("data")
        return {**out, "data": {"name": data["name"], **data["settings"]}}

    def total_updates(self) -> int:
        """Updates of all stages."""
        return sum(s.updates for s in self.stages)

    def is_trained_with_pairs(self) -> bool:
        """Whether a stage is a baseline that is trained on edited images."""
        return any("edited" in find_class("steps", s.step).requirements(s.settings) for s in self.stages)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a file, or the packaged recipe of this name, changed by `overrides` such as
    "stages.1.settings.lr=1e-4" (a list is indexed by number). A stage that is null is left out.

    Raises:
        UserError: the file is missing or not YAML, a key or name is unknown, a value is out of range.
    """
    path = recipe_path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"expected a recipe (a YAML file); got {path}, which cannot be read ({error}); check the path"
        ) from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(
            f"expected a recipe with keys such as name and stages; got {path}, a {type(raw).__name__}; see recipes/"
        )
    if "variants" in raw:
        raise UserError(f"expected a recipe; got {path}, which is a study; run npedit study {path}")
    for override in overrides:
        apply_override(raw, override)
    if isinstance(raw.get("stages"), list):
        raw["stages"] = [stage for stage in raw["stages"] if stage is not None]
    recipe = make_recipe(raw)
    family, critic = recipe.family, recipe.critic
    dtypes = {"family.dtype": family.dtype, "family.vae_dtype": family.vae_dtype}
    require_trainable_dtypes(dtypes | ({"critic.dtype": critic.dtype} if critic else {}))
    return recipe


def make_recipe(raw: Mapping[str, Any]) -> Recipe:
    """Check plain values (as from YAML) and build a recipe.

    Raises:
        UserError: names the key, what was expected, and what came.
    """
    filled = dict(raw)
    for kind, key in (("families", "family"), ("critics", "critic"), ("critics", "judge")):
        if isinstance(filled.get(key), Mapping) and "name" in filled[key]:
            _require_known_name(kind, filled[key]["name"], f"{key}.name")
    data = filled.get("data")
    if isinstance(data, Mapping) and "name" in data:
        _require_known_name("data", data["name"], "data.name")
        own = {k: v for k, v in data.items() if k != "name"}
        filled["data"] = {
            "name": data["name"],
            "settings": validate_settings(find_module("data", data["name"]).Settings, own, "data"),
        }
    if isinstance(filled.get("stages"), list | tuple):
        filled["stages"] = [_parse_stage(s, f"stages.{i}") for i, s in enumerate(filled["stages"])]
    recipe = validate_settings(Recipe, filled, "")
    if recipe.trainer.benchmark:
        _require_known_name("benchmarks", recipe.trainer.benchmark, "trainer.benchmark")
    _check_consistency(recipe)
    return recipe


def _check_consistency(recipe: Recipe) -> None:
    """Refuse a recipe whose parts contradict each other."""
    _check_isolated_references(recipe.family)
    for i, stage in enumerate(recipe.stages):
        if recipe.critic is None and "critic" in find_class("steps", stage.step).requirements(stage.settings):
            raise UserError(
                f"critic: expected a value; got none; stages.{i} ({stage.step}) needs a critic: add the key with its "
                f"name and weights, or set stages.{i}.settings.critic_weight to 0"
            )
        if recipe.critic and recipe.critic.name == "ensemble" and getattr(stage.settings, "answer", "") == "vocabulary":
            raise UserError(
                f"stages.{i}.settings.answer: expected two_way with an ensemble, whose members share no vocabulary; "
                "got vocabulary; set it to two_way, or choose a single critic"
            )
        for role in ("student", "fake") if recipe.trainer.shard != "none" else ():
            if getattr(getattr(stage.settings, role, None), "optimizer", "adamw") != "adamw":
                raise UserError(
                    f"stages.{i}.settings.{role}.optimizer: expected adamw where models are sharded; got adamw8bit, "
                    "whose state cannot be sharded; change it, or set trainer.shard to none"
                )
    if recipe.judge is not None and recipe.judge == recipe.critic:
        raise UserError(
            f"judge: expected another than the critic; got {recipe.judge.weights!r} twice; choose another, or none"
        )
    steps = {"trainer.steps": recipe.trainer.steps}
    for i, stage in enumerate(recipe.stages):
        if hasattr(stage.settings, "steps"):
            steps[f"stages.{i}.settings.steps"] = stage.settings.steps
    if len(set(steps.values())) > 1:
        got = ", ".join(f"{path} = {number}" for path, number in steps.items())
        raise UserError(
            f"{' and '.join(steps)}: expected one number, the few-step editor's steps; got {got}; make them equal"
        )


def _check_isolated_references(chosen: FamilyChoice) -> None:
    """Refuse isolated references with a family that cannot isolate them, before any of its weights are opened."""
    if chosen.isolated_references and not find_class("families", chosen.name).can_isolate_references:
        able = [n for n in available_names("families") if find_class("families", n).can_isolate_references]
        raise UserError(
            f"family.isolated_references: expected false with {chosen.name}, whose references are part of every call; "
            f"got true; set it to false, or choose a family among {', '.join(able)}"
        )


def _parse_stage(stage: Any, path: str) -> Any:
    if not isinstance(stage, Mapping) or "step" not in stage:
        return stage
    _require_known_name("steps", stage["step"], f"{path}.step")
    own = stage.get("settings")
    settings = validate_settings(
        find_class("steps", stage["step"]).Settings, {} if own is None else own, f"{path}.settings"
    )
    return {**stage, "settings": settings}


Model = TypeVar("Model", bound=BaseModel)


def validate_settings(model: type[Model], values: Any, path: str) -> Model:
    """An instance of `model` from plain values; `path` is their key in the recipe ("" for the top level).

    Raises:
        UserError: one line per mistake.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        places = [e["loc"] for e in found]  # a list whose items are wrong is reported as too short as well
        own = [e for e in found if not any(p[: len(e["loc"])] == e["loc"] != p for p in places)]
        lines = [_explain_validation_error(model, e, path) for e in own]
        raise UserError("\n".join(lines)) from None


def _explain_validation_error(model: type[BaseModel], error: Mapping[str, Any], path: str) -> str:
    loc = [str(part) for part in error["loc"]]
    where = ".".join(p for p in (path, *loc) if p) or "the recipe"
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, loc[:-1])
        hint = did_you_mean(loc[-1], known)
        return f"{where}: expected one of {', '.join(known)}; got an unknown key; remove or rename it.{hint}"
    if error["type"] == "missing":
        return f"{where}: expected a value; got none; add the key"
    wanted = "a list, such as [512, 512]" if "tuple" in error["type"] else f"another value ({error['msg']})"
    return f"{where}: expected {wanted}; got {error['input']!r}; change it"


def _known_keys(model: Any, loc: Sequence[str]) -> list[str]:
    """The known keys at the key path `loc` below `model`."""
    for part in loc:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
        for inner in getattr(model, "__args__", ()):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def available_names(kind: str) -> list[str]:
    """The names a recipe may use: the files of `npedit/<kind>/`, without `base`."""
    package = importlib.import_module(f"npedit.{kind}")
    return sorted(
        m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base" and not m.name.startswith("_")
    )


def _require_known_name(kind: str, name: Any, path: str) -> None:
    known = available_names(kind)
    if name not in known:
        raise UserError(
            f"{path}: expected one of {', '.join(known) or 'none yet'}; got {name!r}; correct it."
            f"{did_you_mean(name, known)}"
        )


def find_module(kind: str, name: str) -> ModuleType:
    """Import `npedit.<kind>.<name>`; kinds are families, critics, steps, data, benchmarks.

    Raises:
        UserError: there is no such file; the nearest one is named.
    """
    if kind not in KINDS:
        raise ValueError(f"expected one of {KINDS}; got {kind!r}")
    _require_known_name(kind, name, kind)
    return importlib.import_module(f"npedit.{kind}.{name}")


def find_class(kind: str, name: str) -> Any:
    """The class that a file of families, critics or steps defines: the file's only subclass of the base class."""
    module = find_module(kind, name)
    base = getattr(importlib.import_module(f"npedit.{kind}.base"), BASES[kind])
    found = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, base) and v.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(
            f"expected one subclass of {base.__name__} in {module.__name__}; got {[f.__name__ for f in found]}"
        )
    return found[0]


def embedded_weights(kind: Literal["base", "critic", "editor"]) -> Path:
    """The folder of the weights that ship in the package.

    Raises:
        UserError: this installation lacks them.
    """
    folder = Path(__file__).parents[1] / "toy" / "weights" / kind
    if not folder.is_dir():
        raise UserError(
            f"expected the package's own {kind} weights in {folder}; got none; "
            "the package is incomplete: install it again"
        )
    return folder


def part_dtypes(denoiser: str, text: str = "", vae: str = "") -> dict[str, torch.dtype]:
    """The number types of a pipeline's parts, by diffusers' names; "" is the denoiser's."""
    names = {"transformer": denoiser, "vae": vae or denoiser, "default": text or denoiser}
    return {part: torch_dtype(name) for part, name in names.items()}


def torch_dtype(name: str) -> torch.dtype:
    """Translate "float32" -> torch.float32, and so on."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
