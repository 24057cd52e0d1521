"""Is the gradient right? The derivative of each answer with respect to the student's weights, by finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npedit.data import Example
from npedit.flow import few_step_times
from npedit.generator import generate_few_step, sample_noise, seeded_generator
from npedit.questions import Question
from npedit.steps.base import Parts

STEPS = (1e-2, 1e-1, 1.0)  # expected changes of the margin; the best agreement of them counts


@dataclass(frozen=True)
class GradientCheck:
    """One question about one edited image. `norm` is the norm of the gradient d margin / d weights. `error` is the
    relative difference between the derivative along the gradient and `norm`; None where the gradient is zero or not
    finite."""

    example: Example
    question: Question
    norm: float
    error: float | None


def check_question(
    parts: Parts, student: nn.Module, example: Example, question: Question, steps: int, seed: int
) -> GradientCheck:
    """Compare the gradient of one answer, through critic, decoder and unrolled student, with finite differences. The
    student's weights are as before afterwards."""
    margin = _Margin(parts, student, example, question, steps, seed)
    weights = [p for p in student.parameters() if p.requires_grad]
    gradient = margin.gradient(weights)
    norm = float(torch.stack([g.float().square().sum() for g in gradient]).sum().sqrt())
    if not 0 < norm < float("inf"):  # NaN is neither
        return GradientCheck(example, question, norm, None)
    errors = [_error(margin, weights, gradient, norm, change) for change in STEPS]
    return GradientCheck(example, question, norm, min(errors))


class _Margin:
    """The wanted answer's margin as a function of the student's weights. Noise and times are fixed."""

    def __init__(
        self, parts: Parts, student: nn.Module, example: Example, question: Question, steps: int, seed: int
    ) -> None:
        self.parts, self.student, self.question = parts, student, question
        self.reference = example.reference[None].to(parts.device)
        self.latents = parts.encode_images(self.reference)
        self.text = parts.encode_text([example.instruction])
        schedule = few_step_times(steps, parts.family.noise_shift(*self.reference.shape[-2:]))
        self.times = [float(schedule[0]), *([float(schedule[len(schedule) // 2])] if steps > 1 else [])]
        self.noise = sample_noise(self.latents, len(self.times), seeded_generator(seed, "check gradient", example.id))

    def samples(self) -> Tensor:
        """The student's x0 (1, c, h, w)."""
        return generate_few_step(self.parts.family, self.student, self.text, self.latents, self.times, self.noise)

    def at(self, x0: Tensor) -> Tensor:
        """answer * (logit(Yes) - logit(No)), a scalar."""
        critic = self.parts.critic
        assert critic is not None
        with torch.no_grad():
            reference = critic.encode_images(self.reference)
        edited = critic.encode_images(self.parts.decode_latents(x0))
        looks = [[(reference if name == "reference" else edited)[0] for name in self.question.looks_at]]
        return self.question.answer * critic.margin([self.question.text], looks)[0]

    def gradient(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """d margin / d weights; zeros for weights that the margin does not depend on. It is taken at x0 first, as in
        training."""
        x0 = self.samples()
        with self.parts.on_device("vae", "critic"):
            latents = x0.detach().requires_grad_(True)
            margin = self.at(latents)
            at_x0 = torch.autograd.grad(margin, latents)[0] if margin.requires_grad else torch.zeros_like(x0)
        found = torch.autograd.grad(x0, list(weights), at_x0.to(x0), allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]

    @torch.no_grad()
    def value(self) -> float:
        """The margin with the present weights."""
        x0 = self.samples()
        with self.parts.on_device("vae", "critic"):
            return float(self.at(x0))


@torch.no_grad()
def _error(margin: _Margin, weights: Sequence[Tensor], gradient: Sequence[Tensor], norm: float, change: float) -> float:
    """The relative error along the gradient, for a step that should change the margin by `change` to either side.

    The weights' own type rounds the step; so the expected change is that of the step as it was rounded.
    """
    before = [w.clone() for w in weights]
    values, places = [], []
    for sign in (1, -1):
        for w, old, g in zip(weights, before, gradient, strict=True):
            w.copy_(old + sign * (change / norm**2) * g)
        values.append(margin.value())
        places.append([w.clone() for w in weights])
    for w, old in zip(weights, before, strict=True):
        w.copy_(old)
    expected = sum(
        float(((up.float() - down.float()) * g.float()).sum()) for up, down, g in zip(*places, gradient, strict=True)
    )
    if not expected:
        return float("inf")
    return abs((values[0] - values[1]) / expected - 1)
