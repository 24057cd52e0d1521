"""Encoders are the original recipe: transform, CLS token, projected features; what cannot be opened gives no number."""

import json

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from npedit.errors import UserError
from npedit.scoring import encoders
from npedit.scoring.encoders import Clip, Dino, MissingEncoder, open_encoder
from npedit.scoring.results import MissingScore
from tests.support.encoder_sets import clip, dino

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return dino(root / "dino"), clip(root / "clip")


@pytest.fixture(scope="module")
def photos():
    whole = Image.fromarray(skimage.data.astronaut())
    return [whole.crop((100, 0, 300, 120)), whole.crop((0, 200, 90, 400))]


def test_dino_feature_is_the_cls_token_without_pooler(folders, photos):
    torch.manual_seed(5)
    found = Dino.load(folders[0], CPU).encode_images(photos)
    other = ViTModel.from_pretrained(folders[0])  # with a random pooler
    pixels = torch.stack([encoders._resize_and_crop(p, 32, 28) for p in photos])
    mean, deviation = (torch.tensor(m)[:, None, None] for m in encoders.IMAGENET_MEAN_STD)
    with torch.no_grad():
        seen = other.eval()(pixel_values=(pixels - mean) / deviation)
    expected = torch.nn.functional.normalize(seen.last_hidden_state[:, 0], dim=1)
    assert torch.allclose(found, expected, atol=1e-6) and found.shape == (2, 32)
    assert float(found[0] @ found[1]) < 0.999
    assert torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-6)


def test_the_transform_scales_the_short_side_and_cuts_the_centre():
    """A wide picture of columns: 256 of 512 x 256 keeps the middle, and 224 of that is its central part."""
    wide = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None].repeat(2, 1), (256, 1, 3)))
    cut = encoders._resize_and_crop(wide, 256, 224)
    assert cut.shape == (3, 224, 224)
    assert float(cut[0, 0, 0]) == pytest.approx((512 - 224) // 4 / 255, abs=0.006)
    tall = encoders._resize_and_crop(wide.transpose(Image.Transpose.ROTATE_90), 256, 224)
    assert tall.shape == (3, 224, 224)


def test_clip_features_equal_those_of_transformers(folders, photos):
    """Against the model's own image processor, tokenizer and forward pass."""
    ours = Clip.load(folders[1], CPU)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    model, tokenizer = CLIPModel.from_pretrained(folders[1]).eval(), AutoTokenizer.from_pretrained(folders[1])
    texts = ["a red circle", "a dog in the snow"]
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        pixels = processor(images=photos, return_tensors="pt").pixel_values
        out = model(tokens.input_ids, pixels, tokens.attention_mask)
    assert torch.allclose(ours.encode_images(photos), out.image_embeds, atol=1e-5)
    assert torch.allclose(ours.encode_texts(texts), out.text_embeds, atol=1e-5)
    for text, together in zip(texts, ours.encode_texts(texts)):
        assert torch.allclose(ours.encode_texts([text])[0], together, atol=1e-5)
    longer = "a red circle on the toy dog"
    assert torch.allclose(
        ours.encode_texts([longer + " blue"]), ours.encode_texts([longer]), atol=1e-5
    )  # cut to 8 tokens


def test_encode_resized_uses_the_whole_picture(folders):
    ours = Clip.load(folders[1], CPU)
    plain = Image.new("RGB", (200, 100), "grey")
    edge = plain.copy()
    edge.paste("red", (0, 0, 40, 100))
    assert torch.allclose(*ours.encode_images([plain, edge]), atol=1e-5)
    assert not torch.allclose(*ours.encode_resized([plain, edge]), atol=1e-3)


def test_tags_name_the_encoder_architecture(folders):
    assert Dino.load(folders[0], CPU).tag == "vit32x2-7" == Clip.load(folders[1], CPU).tag
    from transformers import ViTConfig

    assert encoders._architecture_tag(ViTConfig(hidden_size=384, patch_size=16)) == "vits16"


def test_a_missing_encoder_gives_no_score(folders, monkeypatch):
    found = open_encoder(Dino)  # the literature's, and tests have no network
    assert isinstance(found, MissingEncoder) and found.tag == "vits16" and "facebook/dino-vits16" in found.reason
    for use in (found.encode_images, found.encode_resized, found.encode_texts):
        with pytest.raises(MissingScore, match="cannot be opened"):
            use([])
    assert open_encoder(Clip, "none").reason == "CLIP was left out"
    assert isinstance(open_encoder(Clip, folders[1]), Clip)


def test_wrong_weights_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="'vit'; got 'clip'"):
        open_encoder(Dino, folders[1])
    with pytest.raises(UserError, match="expected CLIP weights"):
        open_encoder(Clip, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config\.json"):
        open_encoder(Clip, str(tmp_path))
    lacking = tmp_path / "lacking"
    model = ViTModel.from_pretrained(folders[0], add_pooling_layer=False)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("layernorm")}
    model.save_pretrained(lacking, state_dict=state)
    with pytest.raises(UserError, match="are missing"):
        open_encoder(Dino, str(lacking))
    assert json.loads((lacking / "config.json").read_text())["model_type"] == "vit"
