"""Train the toy's text-to-image model: an ordinary diffusers `FluxPipeline` (transformer, T5, CLIP, VAE) at toy
size."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from npedit import flow
from npedit.families.base import EncodedText
from npedit.families.flux import Flux
from npedit.generator import generate_images
from npedit.toy.edits import EDIT_TYPES, Edit, sample_caption, sample_edit, sample_full_caption
from npedit.toy.oracle import matches_caption, read_scene
from npedit.toy.words import EOS, PAD, VALUES, new_tokenizer, vocabulary
from npedit.toy.world import COLOURS, PATTERNS, PLACES, SHAPES, SIZES, Scene, render, sample_scene
from npedit.toy_models.fit import fit

TEXT_LENGTH = 24
SHIFT = 2.0
THING_VALUES = (tuple(COLOURS), SHAPES, PATTERNS, tuple(SIZES), PLACES)  # what can be said of a thing


def untrained_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """An untrained pipeline around a VAE. The blocks start as the identity (adaLN-Zero, arXiv 2212.09748)."""
    words = vocabulary()
    token_ids = {"pad_token_id": words.index(PAD), "eos_token_id": words.index(EOS)}
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH, bos_token_id=words.index(PAD), **token_ids,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(words), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", **token_ids,
        )
    )  # fmt: skip
    # Each head begins by looking at one neighbour (T5's buckets of the distances -1, -2, 1, 2): from nothing these
    # biases take thousands of small steps, and until then nothing links a colour to its shape.
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        bias[(1, 2, 17, 18), (0, 1, 2, 3)] += 3.0
    net = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * vae.config.latent_channels, num_layers=2, num_single_layers=4,
        attention_head_dim=40, num_attention_heads=4, joint_attention_dim=128, pooled_projection_dim=64,
        guidance_embeds=False, axes_dims_rope=(8, 16, 16),
    )  # fmt: skip
    for name, part in net.named_modules():
        if isinstance(part, nn.Linear) and (
            name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")) or name == "proj_out"
        ):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=clip,
        tokenizer=new_tokenizer(TEXT_LENGTH, add_eos=True),
        text_encoder_2=t5,
        tokenizer_2=new_tokenizer(TEXT_LENGTH, add_eos=True),
        transformer=net,
    )


class _TextHeads(nn.Module):
    """Throw-away heads that make the text encoders read: which words belong to one thing, and of an instruction which
    edit it asks for, of what, to what, where.

    A real text encoder brings this along from its own pre-training, on text alone. Without the first, colours and
    shapes of two things are swapped in half of the pictures; without the second, "remove" and "paint" are noise to the
    student, whose text encoders are frozen.
    """

    def __init__(self, states: int, pooled: int):
        super().__init__()
        self.names = (EDIT_TYPES, ("", *COLOURS), ("", *SHAPES), ("", *PATTERNS), VALUES, ("", *PLACES))
        self.facts = nn.Linear(states + pooled, sum(map(len, self.names)))
        self.thing = nn.Linear(states, sum(len(names) + 1 for names in THING_VALUES))

    def instruction_loss(self, text: EncodedText, edits: list[Edit]) -> Tensor:
        """Cross-entropy of an instruction's facts, from its T5 states in the mean and CLIP's pooled vector."""
        states, pooled = text.parts
        out = self.facts(torch.cat([states.mean(1), pooled], 1)).split([len(n) for n in self.names], 1)
        labels = torch.tensor([[n.index(f) for n, f in zip(self.names, self._instruction_facts(e))] for e in edits])
        return torch.stack([F.cross_entropy(o, labels[:, i]) for i, o in enumerate(out)]).mean()

    def binding_loss(self, text: EncodedText, lines: list[str]) -> Tensor:
        """Cross-entropy, at each word said of a thing, of all that is said of this thing."""
        rows: list[int] = []
        places: list[int] = []
        labels: list[list[int]] = []
        for row, line in enumerate(lines):
            for start, end, values in parse_mentions(line):
                rows += [row] * (end - start)
                places += range(start, end)
                labels += [values] * (end - start)
        out = self.thing(text.parts[0][rows, places]).split([len(names) + 1 for names in THING_VALUES], 1)
        truth = torch.tensor(labels)
        return torch.stack([F.cross_entropy(o, truth[:, i]) for i, o in enumerate(out)]).mean()

    @staticmethod
    def _instruction_facts(edit: Edit) -> tuple[str, ...]:
        words = edit.object.split()
        object_words = [next((w for w in words if w in names), "") for names in (COLOURS, SHAPES, PATTERNS)]
        place = next((p for p in PLACES if edit.instruction.endswith(p)), "")
        return edit.edit_type, *object_words, edit.value, place


def parse_mentions(line: str) -> list[tuple[int, int, list[int]]]:
    """The words said of each thing in a caption or an instruction: first word, word after the last, and what is said:
    for colour, shape, pattern, size and place the number in `THING_VALUES`, or the one after the last for nothing."""
    words, found = line.split(), []
    for i, word in enumerate(words):
        if word not in SHAPES and word != "shape":
            continue
        start = max((k for k in range(i) if words[k] in ("a", "the")), default=-1) + 1
        end = i + 1
        place = " ".join(words[end + 2 : end + 4]) if words[end : end + 2] == ["at", "the"] else ""
        if place in PLACES:
            end += 4
        values = [next((n for n, v in enumerate(vs) if v in words[start : i + 1]), len(vs)) for vs in THING_VALUES[:4]]
        found.append((start, end, [*values, PLACES.index(place) if place in PLACES else len(PLACES)]))
    return found


def train_text_encoders(folder: Path, pipe: FluxPipeline, steps: int, seed: int = 0) -> None:
    """Train the text encoders, on captions and instructions alone; from then on they are frozen, as in FLUX.

    Together with the transformer, at its learning rate, T5's attention (which knows no 1 / sqrt(d)) hardens onto single
    words within a few hundred steps and never binds a colour to its shape.
    """
    heads = _TextHeads(pipe.text_encoder_2.config.d_model, pipe.text_encoder.config.hidden_size)
    trained = nn.ModuleDict({"t5": pipe.text_encoder_2, "clip": pipe.text_encoder, "reader": heads})
    trained.requires_grad_(True)

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        captions = [rng.choice((sample_caption, sample_full_caption))(sample_scene(rng), rng) for _ in range(64)]
        edits = [sample_edit(rng) for _ in range(64)]
        words = [e.instruction for e in edits]
        encoded = _encode_with_gradient(pipe, words)
        instruction_loss = heads.instruction_loss(encoded, edits)
        binding_loss = heads.binding_loss(_encode_with_gradient(pipe, captions), captions) + heads.binding_loss(
            encoded, words
        )
        return instruction_loss + binding_loss, {
            "instruction_loss": float(instruction_loss.detach()),
            "binding_loss": float(binding_loss.detach()),
        }

    fit("text", trained, loss, folder, steps, lr=5e-4, betas=(0.9, 0.98), seed=seed, ema=0.995)
    trained.requires_grad_(False)


def train_base(folder: Path, vae: AutoencoderKL, steps: int, seed: int = 0, scenes: int = 16000) -> FluxPipeline:
    """Text encoders on text alone, a sixth as many steps; then flow matching on captioned scenes for the transformer.

    Half of the captions tell all, 10 % of the texts nothing. Beside half of the pictures a request for an edit may
    stand in place of the caption, as it does beside people's photos: a model that has never read one answers it with
    latents a hundred times too large, since what CLIP makes of it scales every block.
    """
    torch.manual_seed(seed)
    pipe = untrained_pipeline(vae)
    train_text_encoders(folder, pipe, max(1, steps // 6), seed)
    family = Flux(pipe, torch.device("cpu"))
    rng = random.Random(f"base/{seed}")
    edits = [sample_edit(rng) for _ in range(scenes)]
    scenes_drawn = [e.reference if i % 2 else e.target for i, e in enumerate(edits)]
    latents = torch.cat([family.encode(render(scenes_drawn[i : i + 64])) for i in range(0, scenes, 64)])
    net = pipe.transformer.requires_grad_(True)

    def loss(step: int, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        chosen = [rng.randrange(scenes) for _ in range(64)]
        captions = [_sample_prompt(scenes_drawn[i], edits[i].instruction if i % 2 else "", rng) for i in chosen]
        x0 = latents[chosen]
        eps = torch.randn(x0.shape, generator=generator)
        t = flow.shift_times(torch.rand(len(x0), generator=generator), SHIFT)
        v = family.velocity(net, flow.add_noise(x0, eps, t), t, family.encode_text(captions))
        return F.mse_loss(v, flow.velocity(x0, eps)), {}

    fit("base", net, loss, folder, steps, lr=2e-3, betas=(0.9, 0.98), seed=seed, ema=0.999, with_restart=True)
    return pipe


def _sample_prompt(scene: Scene, request: str, rng: random.Random) -> str:
    """A text beside a picture: nothing, the request if there is one, or a caption."""
    roll = rng.random()
    if roll < 0.1:
        return ""
    if request and roll < 0.3:
        return request
    return rng.choice((sample_caption, sample_full_caption))(scene, rng)


def _encode_with_gradient(pipe: FluxPipeline, captions: list[str]) -> EncodedText:
    """Like `Flux.encode_text`, with gradient to the text encoders."""
    ids = pipe.tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return EncodedText((pipe.text_encoder_2(ids)[0], pipe.text_encoder(ids).pooler_output))


@torch.no_grad()
def sample_images(family: Flux, captions: list[str], steps: int, guidance: float, seed: int) -> Tensor:
    """Text-to-image: Euler steps of the guided velocity. Images (b, 3, 32, 32), clamped to [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), family.facts.channels, 8, 8, generator=generator)
    return generate_images(family, captions, noise, flow.few_step_times(steps, SHIFT).tolist(), guidance)


def caption_accuracy(
    family: Flux, count: int, seed: int, steps: int = 20, guidance: float = 5.0, held_out: bool = False
) -> float:
    """Share of held-out scenes' captions whose picture holds all that the caption says, by the oracle. `held_out`
    takes the phrasings kept out of training."""
    rng = random.Random(f"held-out/base/{seed}")
    captions = [sample_caption(sample_scene(rng), rng, held_out=held_out) for _ in range(count)]
    right = 0
    for start in range(0, count, 64):
        chunk = captions[start : start + 64]
        readings = read_scene(sample_images(family, chunk, steps, guidance, seed + start))
        right += sum(matches_caption(c, r) for c, r in zip(chunk, readings))
    return right / count
