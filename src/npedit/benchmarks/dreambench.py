"""DreamBench, the subjects of DreamBooth (arXiv 2208.12242): does an edit keep the subject in a new scene?

The data are the official repository's folder `dataset`: one folder of photos for each subject, and the file
prompts_and_classes.txt (CC BY 4.0, not part of this package). There are 30 subjects, 25 prompts for each subject, and 4
pictures for each prompt. DINO and CLIP-I are the mean cosine similarity between a picture and *all* real photos of the
subject, without a mask. CLIP-T is the cosine similarity between a picture and the prompt. In the literature the
encoders are ViT-S/16 and ViT-B/32.

Deviations from the paper, because an editor gets one photo and is not trained on the subject:

- The instruction is the prompt without the unique token.
- The input is the photo that UNO uses for each subject; for subjects that UNO does not have, the first photo.
- The input is one of the real photos, so an editor that copies the input gets a higher DINO score. Therefore each
  similarity is also given to the input alone (`_input`) and to all other photos (`_held_out`), and `copy/NAME` is the
  score of the unchanged input.

`real/NAME` is the mean over pairs of different real photos, "real images" in the paper: .774 for DINO and .885 for
CLIP-I. These two values test the encoders' weights and transforms. A row is a subject and a prompt, with the mean over
the pictures. A row with a missing picture has no score.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npedit.benchmarks._outputs import EditJob, ProgressCallback, find_picture_any_format, make_opener
from npedit.errors import UserError
from npedit.scoring.encoders import Clip, Dino, MissingEncoder
from npedit.scoring.results import Metrics, MissingScore, Row

PROMPTS = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")  # classes of live subjects, which use the second list of prompts
PICTURES_PER_PROMPT = 4
SUBJECTS, PROMPTS_EACH, PHOTOS = 30, 25, 158  # counts in the official data
REAL = {"real/dino_vits16": 0.774, "real/clip_i_vitb32": 0.885}
TOLERANCE = 0.005
Features = Callable[[], Tensor]  # (n, d), of unit length
INPUTS = {  # the number of the photo that UNO (arXiv 2504.02160) gives to the model
    "backpack": 2, "backpack_dog": 2, "bear_plushie": 3, "berry_bowl": 2, "can": 1, "candle": 2, "cat": 4, "cat2": 2,
    "clock": 3, "colorful_sneaker": 1, "dog": 2, "dog2": 2, "dog3": 5, "dog5": 0, "dog6": 2, "dog7": 1, "dog8": 4,
    "duck_toy": 1, "fancy_boot": 2, "grey_sloth_plushie": 4, "monster_toy": 4, "pink_sunglasses": 4, "poop_emoji": 0,
    "rc_car": 3, "red_cartoon": 0, "robot_toy": 0, "shiny_sneaker": 1, "teapot": 4, "vase": 2, "wolf_plushie": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One subject: the photos in order, the index of the input photo, and the prompts without the unique token."""

    name: str
    photos: tuple[Path, ...]
    input_index: int
    prompts: tuple[str, ...]


def read_subjects(folder: str | Path) -> tuple[list[Subject], str]:
    """The subjects in the official folder, and a hash of the prompts file.

    Raises:
        UserError: there is no prompts file, the file has another form, or a subject has fewer than two photos.
    """
    folder = Path(folder)
    path = folder / PROMPTS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"expected the folder 'dataset' of github.com/google/dreambooth, with {PROMPTS}; got {folder}: {error}; "
            "clone it and give that folder"
        ) from None
    classes, plain, live = parse_prompts_file(text)
    if not classes or not plain or not live:
        raise UserError(f"expected classes and two lists of prompts in {path}; got another form; fetch the file again")
    subjects = []
    for name, kind in classes.items():
        photos = sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if len(photos) < 2:
            raise UserError(f"expected at least two photos in {folder / name}; got {len(photos)}; complete the data")
        stems = [p.stem for p in photos]
        wanted = f"{INPUTS.get(name, -1):02d}"
        prompts = tuple(" ".join(t.format("", kind).split()) for t in (live if kind in LIVE_CLASSES else plain))
        subjects.append(Subject(name, tuple(photos), stems.index(wanted) if wanted in stems else 0, prompts))
    return subjects, hashlib.sha256(text.encode()).hexdigest()


def parse_prompts_file(text: str) -> tuple[dict[str, str], list[str], list[str]]:
    """{subject: class}, the templates of objects, and the templates of live subjects. In a template {0} is the unique
    token and {1} the class."""
    head, _, lists = text.partition("\nPrompts")
    pairs = [line.split(",") for line in head.splitlines() if line.count(",") == 1]
    classes = {name.strip(): kind.strip() for name, kind in pairs if name.strip() != "subject_name"}
    plain, _, live = lists.partition("Live Subject Prompts")
    of_objects, of_live = (
        [a or b for a, b in re.findall(r"'([^'\n]*\{1\}[^'\n]*)'|\"([^\"\n]*\{1\}[^\"\n]*)\"", p)]
        for p in (plain, live)
    )
    return classes, of_objects, of_live


def is_official_data(subjects: Sequence[Subject]) -> bool:
    """Whether there are as many subjects, prompts and photos as in the official data."""
    return (
        len(subjects) == SUBJECTS
        and all(len(s.prompts) == PROMPTS_EACH for s in subjects)
        and sum(len(s.photos) for s in subjects) == PHOTOS
    )


def picture_file_name(subject: Subject, prompt: int, k: int) -> str:
    """The file name of an edited picture: cat/07-0.png is the first picture of the eighth prompt."""
    return f"{subject.name}/{prompt:02d}-{k}.png"


def edit_jobs(subjects: Sequence[Subject], seed: int, pictures_per_prompt: int = PICTURES_PER_PROMPT) -> list[EditJob]:
    """The pictures to be edited. The k-th picture of every prompt uses the noise of seed + k."""
    return [
        EditJob(picture_file_name(s, i, k), s.photos[s.input_index], prompt, seed + k)
        for k in range(pictures_per_prompt)
        for s in subjects
        for i, prompt in enumerate(s.prompts)
    ]


def score_pictures(
    subjects: Sequence[Subject],
    edited: Path,
    dino: Dino | MissingEncoder,
    clip: Clip | MissingEncoder,
    on_progress: ProgressCallback,
    pictures_per_prompt: int = PICTURES_PER_PROMPT,
) -> list[Row]:
    """The scores of the pictures in the folder `edited`, one row for each prompt."""
    rows, total = [], sum(len(s.prompts) for s in subjects)
    for subject in subjects:
        features = {e: _real_photo_features(subject, e) for e in (dino, clip)}
        for i in range(len(subject.prompts)):
            metrics = _metrics_of_prompt(subject, i, pictures_per_prompt, edited, dino, clip, features)
            rows.append(Row.from_metrics(f"{subject.name}/{i:02d}", subject.name, metrics))
            on_progress(len(rows), total)
    return rows


def _real_photo_features(subject: Subject, encoder: Dino | Clip | MissingEncoder) -> Features:
    """A function that returns the features of the real photos. They are computed once."""

    @cache
    def features() -> Tensor:
        return encoder.encode_images([make_opener(p, "photo")() for p in subject.photos])

    return features


def _select_rows(features: Features, rows: Sequence[int]) -> Tensor:
    return features()[list(rows)]


def _metrics_of_prompt(
    subject: Subject,
    prompt: int,
    pictures_per_prompt: int,
    folder: Path,
    dino: Dino | MissingEncoder,
    clip: Clip | MissingEncoder,
    features: Mapping[Any, Features],
) -> Metrics:
    paths = [folder / picture_file_name(subject, prompt, k) for k in range(pictures_per_prompt)]
    others = [j for j in range(len(subject.photos)) if j != subject.input_index]
    everything = {"": [*others, subject.input_index], "_input": [subject.input_index], "_held_out": others}
    made: dict[str, Any] = {}
    copy: dict[str, Any] = {}

    def pictures(encoder: Any) -> Features:
        return cache(
            lambda: encoder.encode_images([make_opener(find_picture_any_format(p), "edited picture")() for p in paths])
        )

    def text() -> Tensor:
        return clip.encode_texts([subject.prompts[prompt]])

    def input_features(encoder: Any) -> Features:
        return lambda: features[encoder]()[[subject.input_index]]

    for name, encoder in (("dino", dino), ("clip_i", clip)):
        edited, real = pictures(encoder), features[encoder]
        for suffix, which in everything.items():
            measure = partial(_mean_cosine, theirs=partial(_select_rows, real, which))
            made[f"{name}_{encoder.tag}{suffix}"] = partial(measure, edited)
            if suffix != "_input":  # of the input to itself: one
                copy[f"copy/{name}_{encoder.tag}{suffix}"] = partial(measure, input_features(encoder))
    made[f"clip_t_{clip.tag}"] = partial(_mean_cosine, pictures(clip), theirs=text)
    copy[f"copy/clip_t_{clip.tag}"] = partial(_mean_cosine, input_features(clip), theirs=text)
    return made | copy


def _mean_cosine(ours: Features, theirs: Features) -> float:
    """The mean cosine similarity over all pairs of features of unit length."""
    return float((ours() @ theirs().T).double().mean())


def real_image_baseline(
    subjects: Sequence[Subject], dino: Dino | MissingEncoder, clip: Clip | MissingEncoder
) -> dict[str, dict[str, Any]]:
    """The "real images" headlines: the mean over pairs of different photos of a subject, then over subjects."""
    out = {}
    for name, encoder in (("dino", dino), ("clip_i", clip)):
        values = []
        for subject in subjects:
            try:
                photos = _real_photo_features(subject, encoder)()
            except MissingScore:
                continue
            off = ~torch.eye(len(photos), dtype=torch.bool)
            values.append(float((photos @ photos.T)[off].double().mean()))
        is_complete = len(values) == len(subjects)
        out[f"real/{name}_{encoder.tag}"] = {
            "value": sum(values) / len(values) if is_complete else None,
            "n": len(values),
            "coverage": len(values) / len(subjects),
            "undefined": 0,
            "ci95": None,
        }
    return out


def real_image_baseline_problems(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Messages about "real images" values that differ from the paper's; [] if none differ."""
    found = []
    for name, expected in REAL.items():
        value = summary.get(name, {}).get("value")
        if value is None:
            found.append(f"{name}: expected {expected}; there is none, so the weights and transforms are not proven")
        elif abs(value - expected) > TOLERANCE:
            found.append(f"{name}: expected {expected} +- {TOLERANCE}; got {value:.4f}: other weights or transforms")
    return found
