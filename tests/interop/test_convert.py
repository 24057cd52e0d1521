"""The released checkpoint as a run: its layout of keys, what its net computes, and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from typer.testing import CliRunner

from npedit.cli.main import app
from npedit.editor import Editor
from npedit.errors import UserError
from npedit.families.z_image import ZImage
from npedit.interop.convert import convert

PROMPT = "paint it red"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Z-Image as a diffusers folder."""
    folder = tmp_path_factory.mktemp("base")
    ZImage.tiny(0).pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def taught() -> nn.Module:
    """Another net like its transformer, such as training there would leave."""
    return ZImage.tiny(1).pipe.transformer


def released(net: nn.Module, file: Path, **changes: Tensor | None) -> Path:
    """The raw layout: names behind `transformer.`; a change of None takes a tensor out."""
    raw = {f"transformer.{name}": value for name, value in net.state_dict().items()} | changes
    torch.save({name: value for name, value in raw.items() if value is not None}, file)
    return file


@pytest.fixture(scope="module")
def run(base, taught, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("converted")
    return convert(released(taught, place / "released.pt"), place / "run", str(base))


def test_converted_run_opens_and_edits(run, base, taught) -> None:
    editor = Editor.open(run)
    assert torch.equal(parameters_to_vector(editor.net.parameters()), parameters_to_vector(taught.parameters()))
    facts = json.loads((run / "final" / "npedit.json").read_text())
    assert facts["base"] == str(base) and facts["dtype"] == "float32"
    assert facts["times"] == pytest.approx([1, 0.9474, 0.8571, 0.6667], abs=5e-5)  # that project's own schedule
    references = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    edited = editor.edit_tensor(references, [PROMPT, "remove the dog"])
    assert edited.shape == references.shape and edited.isfinite().all()
    one = editor.edit_tensor(references[1:], ["remove the dog"])
    torch.testing.assert_close(edited[1:], one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(edited[1:], editor.edit_tensor(references.flip(0)[1:], ["remove the dog"]), atol=1e-3)


def there(net: nn.Module, reference: Tensor, x: Tensor, t: float, caption: Tensor) -> Tensor:
    """What the reimplementation computes for one item, written anew from its description. Latents (c, h, w).

    Caption at places 1, 2, ... of time, filled up to a multiple of 32 with pad tokens, which are attended to; then the
    two frames, one place each; the reference's tokens are modulated with the clean time, all others with the item's.
    """
    c, h, w = x.shape
    film = torch.stack([reference, x], 1)
    patches = film.view(c, 2, h // 2, 2, w // 2, 2).permute(1, 2, 4, 3, 5, 0).reshape(-1, 4 * c)
    places = 1 + torch.arange(len(caption) + -len(caption) % 32)
    start = len(places) + 1
    ids = torch.cartesian_prod(torch.arange(start, start + 2), torch.arange(h // 2), torch.arange(w // 2))
    filling = -len(patches) % 32
    pictured = torch.cat([net.all_x_embedder["2-1"](patches), net.x_pad_token.expand(filling, -1)])
    ids = torch.cat([ids, torch.zeros(filling, 3, dtype=ids.dtype)])
    words = torch.cat([net.cap_embedder(caption), net.cap_pad_token.expand(len(places) - len(caption), -1)])
    spoken = torch.stack([places, 0 * places, 0 * places], 1)
    clean, own = (net.t_embedder(torch.tensor([s]) * net.t_scale) for s in (1.0, 1 - t))
    first = h * w // 4

    def each(layer: nn.Module, length: int) -> Tensor:
        told = [layer(s).expand(n, -1) for s, n in ((clean, first), (own, length - first))]
        return torch.cat(told)[None]

    def block(layer: nn.Module, tokens: Tensor, at: Tensor) -> Tensor:
        attended, fed = layer.attention, layer.feed_forward
        rope = net.rope_embedder(at)[None]
        if not layer.modulation:
            tokens = tokens + layer.attention_norm2(attended(layer.attention_norm1(tokens), freqs_cis=rope))
            return tokens + layer.ffn_norm2(fed(layer.ffn_norm1(tokens)))
        scale, gate, scale_fed, gate_fed = each(layer.adaLN_modulation, tokens.shape[1]).chunk(4, -1)
        seen = attended(layer.attention_norm1(tokens) * (1 + scale), freqs_cis=rope)
        tokens = tokens + gate.tanh() * layer.attention_norm2(seen)
        return tokens + gate_fed.tanh() * layer.ffn_norm2(fed(layer.ffn_norm1(tokens) * (1 + scale_fed)))

    pictured, words = pictured[None], words[None]
    for layer in net.noise_refiner:
        pictured = block(layer, pictured, ids)
    for layer in net.context_refiner:
        words = block(layer, words, spoken)
    tokens, at = torch.cat([pictured, words], 1), torch.cat([ids, spoken])
    for layer in net.layers:
        tokens = block(layer, tokens, at)
    final = net.all_final_layer["2-1"]
    tokens = final.linear(final.norm_final(tokens) * (1 + each(final.adaLN_modulation, tokens.shape[1])))
    out = tokens[0, first : 2 * first].view(h // 2, w // 2, 2, 2, c)
    return -out.permute(4, 0, 2, 1, 3).reshape(c, h, w)


@pytest.mark.parametrize("size", [(4, 6), (8, 8)])  # with and without filling
@torch.no_grad()
def test_converted_editor_equals_the_reimplementation(run, size) -> None:
    editor = Editor.open(run)
    family, stream = editor.family, torch.Generator().manual_seed(0)
    x, reference = (torch.randn(2, 4, *size, generator=stream) for _ in range(2))
    t, text = torch.tensor([1.0, 0.8571]), family.encode_text([PROMPT, "remove the dog from the lawn at once"])
    got = family.velocity(editor.net, x, t, text, (reference,))
    states, lengths = text.parts
    for i in range(2):
        wanted = there(editor.net, reference[i], x[i], float(t[i]), states[i, : lengths[i]])
        torch.testing.assert_close(got[i], wanted, rtol=1e-4, atol=1e-5)
    omni = ZImage.velocity(family, family.base, x, t, text, (reference,))
    assert omni.shape == got.shape  # the base still takes references as images of their own


def test_converted_prompts_end_with_an_empty_thought(run, base) -> None:
    editor, plain = Editor.open(run), ZImage.load(base, torch.float32, torch.device("cpu"))
    (length,), (usual,) = (f.encode_text([PROMPT]).parts[1].tolist() for f in (editor.family, plain))
    assert length - usual == len("<think>\n\n</think>\n\n")  # the tiny tokenizer takes bytes
    plain.thinking = False
    before = plain.encode_text([PROMPT]).parts[0]
    torch.testing.assert_close(editor.family.encode_text([PROMPT]).parts[0], before)


def test_one_reference_of_the_pictures_size(run) -> None:
    editor = Editor.open(run)
    x, t, text = torch.zeros(1, 4, 4, 4), torch.ones(1), editor.family.encode_text([PROMPT])
    for references in ((x, x), (torch.zeros(1, 4, 4, 6),)):
        with pytest.raises(ValueError, match="expected one reference of shape"):
            editor.family.velocity(editor.net, x, t, text, references)


def test_convert_command_writes_a_run(base, taught, tmp_path) -> None:
    file = released(taught, tmp_path / "released.pt")
    done = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "run"), "--base", str(base)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "final" / "transformer").is_dir() and "--run" in done.output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transformer.layers.0.attention.to_q.weight": None}, r"it lacks layers\.0\.attention\.to_q\.weight"),
        ({"transformer.more": torch.zeros(1)}, "it has besides more"),
        ({"transformer.x_pad_token": torch.zeros(1, 7)}, r"x_pad_token \(1, 7\) instead of \(1, 32\)"),
        ({"transformer.x_pad_token": torch.zeros(1, 32).half()}, "it mixes types float16, float32"),
        ({"model": torch.zeros(1)}, "each name with transformer.; got model"),
        ({"transformer.steps": 3}, r"which holds \['Tensor', 'int'\]"),
    ],
)
def test_other_weights_are_refused(base, taught, tmp_path, changes, said) -> None:
    file = released(taught, tmp_path / "released.pt", **changes)
    with pytest.raises(UserError, match=said):
        convert(file, tmp_path / "run", str(base))
    assert not (tmp_path / "run").exists()


def test_other_files_are_refused(base, taught, tmp_path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="there is no"):
        convert(tmp_path / "none.pt", tmp_path / "run", str(base))
    for name in ("text.pt", "list.pt"):
        with pytest.raises(UserError, match=f"expected the released checkpoint.*{name}"):
            convert(tmp_path / name, tmp_path / "run", str(base))
    whole = released(taught, tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="download it again"):
        convert(tmp_path / "cut.pt", tmp_path / "run", str(base))


def test_a_file_with_code_is_not_run(base, tmp_path) -> None:
    torch.save({"transformer.a": torch.device}, tmp_path / "code.pt")  # not a weight
    torch.save({"transformer.a": Path("here")}, tmp_path / "object.pt")
    for name in ("code.pt", "object.pt"):
        with pytest.raises(UserError, match="expected the released checkpoint"):
            convert(tmp_path / name, tmp_path / "run", str(base))


def test_other_bases_and_places_are_refused(base, taught, tmp_path) -> None:
    file = released(taught, tmp_path / "released.pt")
    with pytest.raises(UserError, match="--base: expected a Z-Image that opens"):
        convert(file, tmp_path / "run", str(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        convert(file, tmp_path / "full", str(base))
