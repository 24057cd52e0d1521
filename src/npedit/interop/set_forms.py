"""The forms of public data sets of image edits: which column holds what, and which columns are never read.

The column names are those of the sets' cards and of the code that reads them. A form says where a reference, an
instruction and captions are found. Columns of edited images are listed in `edited`, so that messages can name them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from npedit.interop.set_records import PICTURES

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One edit of a record. `photo` is a file name, or the parquet struct with `bytes`; `skip` says why the edit is not
    taken."""

    photo: Any = None
    instruction: Any = ""
    edit_type: str = ""
    object: str = ""
    source_caption: str = ""
    target_caption: str = ""
    id: str = ""
    more_photos: tuple[Any, ...] = ()
    skip: str = ""


@dataclass(frozen=True)
class SetForm:
    """How to read one kind of data set. Each field names columns; the first that a record has is used.

    `files` are patterns of the set's lists inside a folder; `photo_folders` are tried for relative file names.
    `split` takes a record apart where columns alone do not say enough.
    """

    title: str
    photo: tuple[str, ...] = ()
    instruction: tuple[str, ...] = ()
    edit_type: tuple[str, ...] = ()
    object: tuple[str, ...] = ()
    source_caption: tuple[str, ...] = ()
    target_caption: tuple[str, ...] = ()
    id: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()
    also: tuple[str, ...] = ()  # further columns that `split` reads
    files: tuple[str, ...] = ("*.parquet",)
    all_files: bool = False  # the lists of all patterns belong to the set, not of the first one only
    photo_folders: tuple[str, ...] = (".",)
    needs_photos: bool = False  # the pictures beside the lists may be edited images, so --photos must be given
    licence: str = ""
    notes: tuple[str, ...] = ()
    split: Callable[[SetForm, Record], Iterator[Entry]] = field(default=lambda form, record: one_entry(form, record))

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read; no other is."""
        fields = (
            self.photo,
            self.instruction,
            self.edit_type,
            self.object,
            self.source_caption,
            self.target_caption,
            self.id,
        )
        return tuple(dict.fromkeys(name for names in (*fields, self.also) for name in names))

    def with_columns(self, columns: Mapping[str, str]) -> SetForm:
        """The form with these columns for its fields."""
        changes: dict[str, Any] = {name: (column,) for name, column in columns.items()}
        return replace(self, **changes)


def first_value(record: Record, names: tuple[str, ...]) -> Any:
    """The value of the first of these columns that is there and not empty; None if there is none."""
    return next((record[name] for name in names if record.get(name) not in (None, "", [])), None)


def _text(record: Record, names: tuple[str, ...]) -> str:
    value = first_value(record, names)
    return "" if value is None else str(value)


def one_entry(form: SetForm, record: Record) -> Iterator[Entry]:
    """The record as one edit, by its columns. Of a list of instructions (paraphrases), the first is taken."""
    instruction = first_value(record, form.instruction)
    yield Entry(
        photo=first_value(record, form.photo),
        instruction=instruction[0] if isinstance(instruction, list) else instruction,
        edit_type=_text(record, form.edit_type),
        object=_text(record, form.object),
        source_caption=_text(record, form.source_caption),
        target_caption=_text(record, form.target_caption),
        id=_text(record, form.id),
    )


def _pico_banana(form: SetForm, record: Record) -> Iterator[Entry]:
    """A single-turn line, or the first turn of a multi-turn line: later turns edit an edited image."""
    if "metadata_edit_turn_prompts" not in record:
        (entry,) = one_entry(form, record)
        photo = entry.photo or PurePosixPath(str(record.get("open_image_input_url", ""))).name
        yield Entry(photo, entry.instruction, entry.edit_type, id=PurePosixPath(entry.id).stem)
        return
    files = {f.get("id"): f.get("url", "") for f in record.get("files", ()) if isinstance(f, Mapping)}
    photo = record.get("local_input_image") or PurePosixPath(str(files.get("original_input_image", ""))).name
    for turn, prompt in enumerate(record["metadata_edit_turn_prompts"]):
        yield Entry(photo, prompt) if turn == 0 else Entry(skip="a later turn: it edits an edited image")


def _gpt_image_edit(form: SetForm, record: Record) -> Iterator[Entry]:
    """A record of the metadata files, or of the training files: images [input, output] and a conversation."""
    if "conversations" not in record:
        yield from one_entry(form, record)
        return
    images = record.get("image") or [None]
    said = [c.get("value", "") for c in record["conversations"] if c.get("from") in ("human", "user")]
    words = " ".join(said[:1]).replace("<image>", " ").split()
    yield Entry(images[0] if isinstance(images, list) else images, " ".join(words), id=str(record.get("id", "")))


def _magicbrush(form: SetForm, record: Record) -> Iterator[Entry]:
    turn = record.get("turn_index") or 1
    if turn > 1:
        yield Entry(skip="a later turn: it edits an edited image")
        return
    (entry,) = one_entry(form, record)
    yield Entry(entry.photo, entry.instruction, id=f"{entry.id}-{turn}" if entry.id else "")


def _several_photos(form: SetForm, record: Record) -> Iterator[Entry]:
    """A record whose photo column may hold a list, or that has numbered columns (`control_path_0`, ...)."""
    (entry,) = one_entry(form, record)
    numbers = [
        key for key in sorted(record) if key.rpartition("_")[0] in form.photo and key.rpartition("_")[2].isdigit()
    ]
    numbered = [record[key] for key in numbers]
    photos = entry.photo if isinstance(entry.photo, list) else [entry.photo] if entry.photo else numbered
    fields = {k: getattr(entry, k) for k in ("instruction", "edit_type", "object", "source_caption", "target_caption")}
    yield Entry(photo=photos[0] if photos else None, id=entry.id, more_photos=tuple(photos[1:]), **fields)


FORMS = {
    "pico-banana": SetForm(
        "pico-banana-400k",
        photo=("local_input_image",),
        instruction=("text",),
        edit_type=("edit_type",),
        id=("output_image",),
        also=("open_image_input_url", "files", "metadata_edit_turn_prompts"),
        edited=("output_image",),
        files=("sft*.jsonl", "multi*.jsonl"),
        all_files=True,
        licence="CC BY-NC-ND 4.0 (edits), CC BY 2.0 (photos of Open Images)",
        notes=("The photos are those of Open Images: download them and give their folder with --photos.",),
        split=_pico_banana,
    ),
    "gpt-image-edit": SetForm(
        "GPT-Image-Edit-1.5M",
        photo=("input",),
        instruction=("instruction",),
        edit_type=("task",),
        source_caption=("input_description",),
        id=("id",),
        also=("image", "conversations"),
        edited=("output",),
        files=("metadata/*.json",),
        photo_folders=(".", ".."),
        licence="CC BY 4.0",
        split=_gpt_image_edit,
    ),
    "magicbrush": SetForm(
        "MagicBrush",
        photo=("source_img",),
        instruction=("instruction",),
        id=("img_id",),
        also=("turn_index",),
        edited=("target_img", "mask_img"),
        licence="CC BY 4.0",
        split=_magicbrush,
    ),
    "instructpix2pix": SetForm(
        "InstructPix2Pix",
        photo=("original_image", "input_image"),
        instruction=("edit_prompt",),
        source_caption=("original_prompt",),
        target_caption=("edited_prompt",),
        edited=("edited_image",),
        notes=("Its references are generated pictures.",),
    ),
    "ultraedit": SetForm(
        "UltraEdit",
        photo=("source_image",),
        instruction=("edit_prompt",),
        source_caption=("source_caption",),
        target_caption=("target_caption",),
        id=("idx",),
        edited=("edited_image", "mask_image"),
        licence="CC BY 4.0",
        notes=("Its references are generated pictures.",),
    ),
    "omniedit": SetForm(
        "OmniEdit-Filtered-1.2M",
        photo=("src_img",),
        instruction=("edited_prompt_list",),
        edit_type=("task",),
        id=("omni_edit_id",),
        edited=("edited_img",),
        licence="MIT",
    ),
    "merged-list": SetForm(
        "merged list of NP-Edit's public reimplementation",
        photo=("input_image_path",),
        instruction=("edit_instruction",),
        edit_type=("edit_type",),
        object=("category",),
        source_caption=("input_description",),
        target_caption=("edited_caption",),
        id=("id",),
        files=("*.json",),
    ),
    "edit-r1": SetForm(
        "data of Edit-R1",
        photo=("image",),
        instruction=("prompt",),
        files=("train_metadata.jsonl",),
        photo_folders=(".", "images"),
    ),
    "flow-factory": SetForm(
        "data of Flow-Factory",
        photo=("image", "images"),
        instruction=("prompt",),
        files=("train.jsonl",),
        photo_folders=(".", "images"),
        split=_several_photos,
    ),
    "pref-grpo": SetForm(
        "data of Pref-GRPO",
        photo=("source_image",),
        instruction=("instruction",),
        edited=("target_image",),
        files=("*.parquet", "*.jsonl", "*.json"),
        photo_folders=(".", "images"),
    ),
    "promptrl": SetForm(
        "data of PromptRL",
        photo=("image",),
        instruction=("prompt",),
        source_caption=("caption",),
        target_caption=("target_caption",),
        files=("*.parquet", "*.jsonl"),
        photo_folders=(".", "images"),
    ),
    "diffusers": SetForm(
        "data of diffusers' image-to-image training",
        photo=("cond_image",),
        instruction=("caption",),
        edited=("image",),
        files=("*.parquet", "metadata.jsonl", "metadata.csv"),
    ),
    "diffsynth": SetForm(
        "data of DiffSynth-Studio",
        photo=("edit_image",),
        instruction=("prompt",),
        edited=("image",),
        files=("metadata.csv", "metadata.json", "metadata.jsonl"),
        split=_several_photos,
    ),
    "musubi": SetForm(
        "data of musubi-tuner",
        photo=("control_path",),
        instruction=("caption",),
        edited=("image_path",),
        files=("*.jsonl",),
        split=_several_photos,
    ),
    "caption-files": SetForm(
        "caption files and photos of the same names (ai-toolkit, SimpleTuner)",
        photo=("photo",),
        instruction=("instruction",),
        id=("id",),
        files=("*.txt",),
        needs_photos=True,
    ),
    "folder": SetForm(
        "photos and a file instructions.txt: every instruction for every photo",
        photo=("photo",),
        instruction=("instruction",),
        id=("id",),
        files=("instructions.txt",),
    ),
    "webdataset": SetForm(
        "WebDataset shards",
        photo=PICTURES,
        instruction=("instruction", "txt"),
        edit_type=("edit_type",),
        object=("object",),
        source_caption=("source_caption",),
        target_caption=("target_caption",),
        id=("__key__",),
        files=("*.tar",),
    ),
    "columns": SetForm(
        "a table with named columns",
        instruction=("instruction",),
        edit_type=("edit_type",),
        object=("object",),
        source_caption=("source_caption",),
        target_caption=("target_caption",),
        id=("id",),
        files=("*.parquet", "*.jsonl", "*.csv", "*.json"),
    ),
}
