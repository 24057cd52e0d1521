"""What a text encoder does not read is known, for every family, and it is exactly that."""

import json
import random
import string

import pytest
import torch
from PIL import Image

from npedit.editor import Editor
from npedit.families._prompts import text_after_tokens, truncation_message
from npedit.families.flux import Flux
from npedit.recipe.config import embedded_weights, find_class, load_recipe
from npedit.training.parts import build_parts, build_source, check_recipe_fits
from tests.support.photo_sets import plain, row, save, write_metadata

FAMILIES = ("flux", "krea2", "qwen_image", "sana", "sd3", "z_image")


def letters(count, seed):
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=count))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_truncated_part_is_what_the_states_do_not_depend_on(name):
    family = find_class("families", name).tiny(0)
    _, limit = family.prompt_tokenizer_and_limit()
    text = letters(limit + 200, 0)
    lost, nothing = family.truncated_part([text, text[:limit]])
    assert lost == text[limit:]
    assert nothing == ""
    kept = text[: -len(lost)]
    other_end, other_last = kept + letters(200, 1), kept[:-1] + ("a" if kept[-1] != "a" else "b") + lost
    encoded = family.encode_text([text, other_end, other_last])
    for part in encoded.parts:
        assert torch.equal(part[0], part[1]), "the lost part is not read"
    assert any(not torch.equal(part[0], part[2]) for part in encoded.parts), "the last kept token is read"


def test_sd3_without_t5_is_measured_by_clip():
    family = find_class("families", "sd3").tiny(0)
    family.pipe.tokenizer_3 = family.pipe.text_encoder_3 = None
    text = letters(200, 0)
    assert family.truncated_part([text]) == [text[family.prompt_tokenizer_and_limit()[1] :]]
    assert family.prompt_tokenizer_and_limit()[1] <= family.pipe.tokenizer.model_max_length


@pytest.fixture(scope="module")
def toy():
    return Flux.load(embedded_weights("base"), torch.float32, torch.device("cpu"))


def test_the_toys_words_are_counted_and_the_lost_ones_come_back_as_written(toy):
    _, limit = toy.prompt_tokenizer_and_limit()
    assert toy.truncated_part(["red " * limit, "Red, " * limit + "a Blue: cross!"]) == ["", "a Blue: cross!"]
    long = "a red circle " * 20
    assert "cross" not in long
    assert all(torch.equal(*part) for part in toy.encode_text([long + "cross", long + "square"]).parts)


def test_no_length_of_text_that_fits_is_called_too_long(toy):
    """The shortcut for short texts agrees with the tokenizer for every length and for letters of many bytes."""
    tokenizer, limit = toy.prompt_tokenizer_and_limit()
    for sign in "aé猫 .":
        for count in range(limit - 3, limit + 4):
            tokens = len(tokenizer(sign * count + " red" * limit, add_special_tokens=False).input_ids)
            lost = text_after_tokens(tokenizer, limit, sign * count + " red" * limit)
            assert bool(lost) == (tokens > limit)


def test_the_message_counts_rows_and_names_the_worst(toy):
    fits, long, longer = "paint it red", "red " * 40, "red " * 60 + "and a blue cross"
    texts = [("0", fits), ("1", long), ("1", fits), ("2", fits), ("2", longer), ("3", long), ("3", long)]
    message = truncation_message(toy, texts)
    assert message.startswith("3 rows")
    assert "worst is 2," in message
    assert len(message) < 400
    assert truncation_message(toy, [("0", fits)]) == ""


def test_the_editor_says_once_which_part_of_an_instruction_it_does_not_read(toy, caplog):
    editor = Editor(toy, toy.trainable_net(), 1, [(32, 32)])
    photo = Image.new("RGB", (32, 32))
    for _ in range(2):
        editor.edit([photo, photo], ["paint it red", "red " * 40 + "and a blue cross"])
    (record,) = (r for r in caplog.records if r.name == "npedit.editor")  # diffusers logs what CLIP does not read
    assert "blue cross" in record.getMessage()


def test_training_reports_them_at_its_start(tmp_path, caplog):
    save(tmp_path, "a.png", plain(32, 32))
    long = row("a.png", instruction="red " * 60, source_caption="a red circle")
    data = {"name": "imagefolder", "path": str(write_metadata(tmp_path, [long])), "sizes": [[32, 32]]}
    recipe = load_recipe("toy", [f"data={json.dumps(data)}", 'trainer.benchmark=""'])
    check_recipe_fits(recipe, build_source(recipe), build_parts(recipe))
    assert "1 rows have" in caplog.text
    assert "metadata.jsonl:1" in caplog.text
