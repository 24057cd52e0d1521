"""The few-step editor. `generate_few_step` makes all transitions, with gradient in training and without at inference.

    x0 <- eps - v(eps, t = 1);  at each further t:  x_t <- (1 - t) x0 + t eps', eps' FRESH;  x0 <- x_t - t v(x_t, t)

Source: NP-Edit, section 3, "two-step unrolling". Training samples one later time, inference visits
all times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from npedit import flow
from npedit.families import _decode
from npedit.families.base import EncodedText, Family
from npedit.nets.distributed import global_batch_size, local_slice

BATCH_PIXELS = 1024 * 1024  # of one pass without gradient, counted at the size that it works at
BATCH_ITEMS = 16  # the most pictures in one pass
NOISE_VERSION = 2  # raise it when `seeded_noise` gives a seed other noise: benchmarks then make their pictures anew


def items_per_pass(height: int, width: int) -> int:
    """How many pictures of this size are made or looked at in one pass without gradient: at most `BATCH_PIXELS` in all,
    so that memory does not depend on the number of pictures."""
    return max(1, min(BATCH_ITEMS, BATCH_PIXELS // (height * width)))


def seeded_generator(*key: object) -> torch.Generator:
    """A CPU random generator whose numbers depend on the key alone, so a resumed run repeats itself on any machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def generate_few_step(
    family: Family,
    net: nn.Module,
    text: EncodedText,
    references: Float[Tensor, "b c h w"],
    times: Sequence[float],
    noise: Sequence[Float[Tensor, "b c h w"]],
    extra_references: Float[Tensor, "b k c h w"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """The edited image's clean latents x0, after one transition at each of `times` (the first is 1). Each has its own
    noise. `extra_references` are the latents of further references.

    Gradients flow to `net` through every call. Isolated references are read in one pass, which all times use.
    """
    x0 = torch.zeros_like(noise[0])
    given = family.prepare_references(net, all_references(references, extra_references), text)
    for time, eps in zip(times, noise, strict=True):
        t = torch.full((len(eps),), float(time), device=eps.device)
        x = flow.add_noise(x0, eps, t)
        x0 = flow.predict_x0(x, family.velocity(net, x, t, text, given), t)
    return x0


def all_references(references: Tensor, extra_references: Tensor | None) -> tuple[Tensor, ...]:
    """Latents (b, c, h, w) and those of k further references (b, k, c, h, w), as `Family.velocity` takes them."""
    return (references, *(() if extra_references is None else extra_references.unbind(1)))


def sample_training_times(times: Float[Tensor, "steps"], generator: torch.Generator) -> list[float]:
    """The times that one training step unrolls. k is drawn uniformly from the schedule: for k = 1 the first time alone,
    else the first and the k-th. The caller seeds the generator equally on all ranks."""
    k = int(torch.randint(len(times), (), generator=generator))
    return [float(times[0])] if k == 0 else [float(times[0]), float(times[k])]


def sample_noise(like: Float[Tensor, "b c h w"], count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` independent noise tensors with the shape, type and device of `like`, sampled on the CPU. Each process
    samples the noise of the global batch and keeps its own rows."""
    shape = (global_batch_size(len(like)), *like.shape[1:])
    return [local_slice(torch.randn(shape, generator=generator)).to(like) for _ in range(count)]


def seeded_noise(like: Float[Tensor, "b c h w"], seeds: Sequence[int], count: int) -> list[Tensor]:
    """`count` noise tensors with the shape, type and device of `like`. Row i comes from
    `torch.Generator("cpu").manual_seed(seeds[i])`, in float32, one tensor after the other. diffusers' pipelines and
    schedulers draw in this order (`randn_tensor`), so a generator with the same seed gives an exported pipeline the
    same noise.

    Raises:
        ValueError: a seed is not an integer of 64 bits.
    """
    if any(not -(2**63) <= seed < 2**64 for seed in seeds):
        raise ValueError(f"expected seeds from -2^63 to 2^64 - 1; got {list(seeds)}")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    shape = (1, *like.shape[1:])
    return [torch.cat([torch.randn(shape, generator=g) for g in generators]).to(like) for _ in range(count)]


@torch.no_grad()
def generate_images(
    family: Family,
    captions: Sequence[str],
    noise: Float[Tensor, "b c h w"],
    times: Sequence[float],
    guidance: float,
    tile: int = 0,
) -> Float[Tensor, "b 3 H W"]:
    """Images in [0, 1] that the base model generates from captions alone: Euler steps of the velocity with
    classifier-free guidance, from `noise` at times[0] = 1 down to 0. `tile` as in `edit_images`."""
    text, blank, x = family.encode_text(captions), family.encode_negative_text([""] * len(captions)), noise
    for now, then in zip(times, [*times[1:], 0.0]):
        t = torch.full((len(captions),), now, device=x.device)
        v = family.velocity(family.base, x, t, text)
        if guidance != 1:
            v0 = family.velocity(family.base, x, t, blank)
            v = v0 + guidance * (v - v0)
        x = x + (then - now) * v
    return _decode.decode_latents(family, x, tile).clamp(0, 1).float()


@torch.no_grad()
def edit_images(
    family: Family,
    net: nn.Module,
    references: Float[Tensor, "b 3 H W"],
    instructions: Sequence[str],
    seeds: Sequence[int] | int = 0,
    steps: int = 4,
    tile: int = 0,
    on_device: Callable[[str], AbstractContextManager[object]] = nullcontext,
    extra_references: Float[Tensor, "b k 3 H W"] | None = None,
) -> Float[Tensor, "b 3 H W"]:
    """The edited images, in [0, 1]. Each image has noise from its own seed (`seeded_noise`), so a batch equals its
    images one by one.

    `tile` is the side, in pixels, of the decoder's tiles (`families/_decode.py`); 0 means no tiles. `on_device` gives a
    context in which one part ("text", "vae" or "net") is on the device; at most one is entered at a time.
    `extra_references` are further reference images, the same number for each item.

    Raises:
        ValueError: more references than the family takes.
    """
    seeds = [seeds] * len(references) if isinstance(seeds, int) else list(seeds)
    times = flow.few_step_times(steps, family.noise_shift(*references.shape[-2:])).tolist()
    with on_device("vae"):
        latents, extra = family.encode(references.to(family.device)), None
        if extra_references is not None:
            if extra_references.shape[1] >= family.most_references:
                most, got = family.most_references, 1 + extra_references.shape[1]
                raise ValueError(f"expected at most {most} references, the edited picture included; got {got}")
            flat = family.encode(extra_references.to(family.device).flatten(0, 1))
            extra = flat.unflatten(0, extra_references.shape[:2])
    noise = seeded_noise(latents, seeds, steps)
    with on_device("text"):
        text = family.encode_text(instructions)
    with on_device("net"):
        x0 = generate_few_step(family, net, text, latents, times, noise, extra)
    with on_device("vae"):
        return _decode.decode_latents(family, x0, tile).clamp(0, 1).float()
