"""What the tests of the steps share: tiny real parts, a batch of mixed edit types, and a look at all weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.data import Batch, Example, collate
from npedit.families.flux import Flux
from npedit.recipe.config import LoraChoice, MemorySettings
from npedit.steps.base import Parts

ITEMS = [  # instruction, edit type, object, source caption, target caption
    ("paint the circle red", "recolour", "circle", "a blue circle", "a red circle"),
    ("remove the dog", "remove", "dog", "a dog by a fence", "a fence"),
    ("add a square", "add", "square", "grass", "a square on grass"),
    ("make the circle a square", "replace", "circle", "a circle", "a square"),
]


def parts(critic: bool = True, lora: bool = False, **memory) -> Parts:
    """Fresh ones, so that no test changes another's."""
    adapters = LoraChoice(rank=4, alpha=6.0) if lora else None
    judge = LlavaOnevision.tiny(0) if critic else None
    return Parts(Flux.tiny(0), judge, "short", torch.device("cpu"), adapters, MemorySettings(**memory))


def example(number: int, side: int = 16) -> Example:
    picture = torch.rand(3, side, side, generator=torch.Generator().manual_seed(number))
    words, kind, thing, source, target = ITEMS[number % len(ITEMS)]
    return Example(f"item-{number}", picture, words, kind, thing, source, target)


def batch(*numbers: int, nothing: tuple[int, ...] = ()) -> Batch:
    """These items; those in `nothing` are to be left alone."""
    return collate([example(n).as_identity_edit("do nothing") if n in nothing else example(n) for n in numbers])


def nets(of: Parts) -> dict[str, nn.Module]:
    """All frozen nets, by name."""
    pipe = of.family.pipe
    found = {"teacher": of.family.base, "vae": pipe.vae, "clip": pipe.text_encoder, "t5": pipe.text_encoder_2}
    return found | ({"critic": of.critic.model} if of.critic else {})


def weights(net: nn.Module) -> Tensor:
    """All parameters and buffers of a net as one vector of its own; of a base, without adapters laid on it."""
    own = [v for n, v in net.state_dict().items() if ".lora_" not in n]
    return torch.cat([v.detach().double().flatten() for v in own]).clone()


def trained(net: nn.Module) -> list[nn.Parameter]:
    """What a learner would train."""
    return [p for p in net.parameters() if p.requires_grad]


def nudge(net: nn.Module, seed: int = 1, by: float = 0.02) -> None:
    """Move a net away from where it starts."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(net):
            p += by * torch.randn(p.shape, generator=stream)
