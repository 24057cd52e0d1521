"""What must hold for every family, as tests to inherit: `class TestX(FamilyChecks)` with `kind`, `pipeline`, `parts`.

Parity with the family's own pipeline is in each family's file, for each pipeline is called in its own way.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npedit import flow
from npedit.families.base import EncodedText, Family

HEIGHT, WIDTH = 24, 40  # not square, so that rows and columns cannot be mixed up
PROMPTS = ["a red circle on grass", "two blue squares, and a somewhat longer caption"]
GRID = [1.0, 0.75, 0.5, 0.25]  # four steps before the shift


def latents(family: Family, batch: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Noise in the shape of the latents of pictures of this size."""
    shape = (batch, family.facts.channels, height // family.facts.stride, width // family.facts.stride)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(batch: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 3) -> Tensor:
    """Random pictures in [0, 1]."""
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def record_calls(net: nn.Module, run: Callable[[], Any]) -> tuple[list[dict[str, Any]], Any]:
    """The arguments of every call of the net during `run()`, by name, and what `run()` returned."""
    names, calls = tuple(inspect.signature(net.forward).parameters), []
    hook = net.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(dict(zip(names, args)) | kwargs), with_kwargs=True
    )
    try:
        result = run()
    finally:
        hook.remove()
    return calls, result


@torch.no_grad()
def euler(
    family: Family, x: Tensor, text: EncodedText, references: tuple[Tensor, ...] = (), guidance: float = 1.0
) -> Tensor:
    """Ordinary Euler steps with our velocity on the times that the pipeline has just used."""
    times = family.pipe.scheduler.sigmas
    blank = family.encode_text([""] * len(x))
    for now, then in zip(times[:-1], times[1:]):
        v = family.velocity(family.base, x, now.expand(len(x)), text, references)
        if guidance != 1:
            v0 = family.velocity(family.base, x, now.expand(len(x)), blank, references)
            v = v0 + guidance * (v - v0)
        x = x + (then - now) * v
    return x


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, ...]) -> None:
    """These arguments of two calls are equal to rounding."""
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


class FolderChecks:
    """Opening a family's folder. `pipeline` is the class of the family's pipeline, `parts` some that it needs."""

    kind: type[Family]
    pipeline: str
    parts: tuple[str, ...]
    size = (HEIGHT, WIDTH)
    seed = 0  # of `tiny`, which makes other configs of a family for other seeds

    @pytest.fixture(scope="class")
    def family(self) -> Family:
        made = self.kind.tiny(self.seed)
        made.pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():  # so that pictures leave [0, 1] and a clamp would show
            made.pipe.vae.decoder.conv_out.weight.mul_(20)
        return made

    @pytest.fixture(scope="class")
    def folder(self, family, tmp_path_factory):
        place = tmp_path_factory.mktemp("family") / "base"
        family.pipe.save_pretrained(place)
        return place

    def test_a_folder_is_loaded(self, family, folder):
        loaded = self.kind.load(folder, torch.float32, torch.device("cpu"))
        x, t = latents(family, 1, *self.size), torch.tensor([0.5])
        with torch.no_grad():
            a, b = (f.velocity(f.base, x, t, f.encode_text(PROMPTS[:1])) for f in (loaded, family))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert loaded.facts == family.facts and loaded.noise_shift(64, 32) == family.noise_shift(64, 32)
        for part in loaded.pipe.components.values():
            if isinstance(part, nn.Module):
                assert not part.training and not any(p.requires_grad for p in part.parameters())

    def test_a_folder_is_loaded_in_another_type(self, folder):
        """The nets work in bfloat16. Latents stay float32, so x_t and the DMD gradient keep all their bits."""
        family = self.kind.load(folder, torch.bfloat16, torch.device("cpu"))
        z = family.encode(pictures(1, *self.size))
        assert next(family.base.parameters()).dtype is torch.bfloat16 and z.dtype is torch.float32
        assert family.decode(z).dtype is torch.bfloat16 and family.decode(z).isfinite().all()
        t, text = torch.tensor([0.5]), family.encode_text(PROMPTS[:1])
        nets = family.trainable_net(), family.trainable_net().float()  # the second is what a learner makes of it
        with torch.no_grad():
            low, high = (family.velocity(net, z, t, text, (z,)) for net in nets)
        assert low.dtype is high.dtype is torch.float32
        torch.testing.assert_close(low, high, atol=0.1, rtol=0.1)

    def test_a_folder_without_index_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="model_index.json.*has none"):
            self.kind.load(tmp_path, torch.float32, torch.device("cpu"))

    def test_another_pipeline_is_refused(self, tmp_path):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
        with pytest.raises(ValueError, match=f"{self.pipeline}.*got StableDiffusionPipeline"):
            self.kind.load(tmp_path, torch.float32, torch.device("cpu"))

    def test_a_missing_part_is_named(self, folder, tmp_path):
        for part in self.parts:
            broken = tmp_path / part
            shutil.copytree(folder, broken)
            shutil.rmtree(broken / part)
            with pytest.raises(FileNotFoundError, match=rf"\b{part}\b"):
                self.kind.load(broken, torch.float32, torch.device("cpu"))


class FamilyChecks(FolderChecks):
    """See the module's head."""

    # ------------------------------------------------------------------------------------------------------- text

    def test_text_depends_on_the_prompt(self, family):
        text = family.encode_text(PROMPTS)
        assert len(text) == 2
        assert not torch.allclose(text.parts[0][0], text.parts[0][1])

    def test_a_prompts_length_changes_nothing_for_the_others(self, family):
        """Encoded and used alone, beside a longer and beside an empty one: the same answer."""
        x, t = latents(family, 3), torch.tensor([1.0, 0.6, 0.1])
        prompts = [PROMPTS[0], PROMPTS[1] + " that goes on", ""]
        references = (latents(family, 3, seed=9),)
        together = family.encode_text(prompts)
        alone = [family.encode_text([p]) for p in prompts]
        with torch.no_grad():
            wanted = torch.cat(
                [
                    family.velocity(family.base, x[i : i + 1], t[i : i + 1], alone[i], (references[0][i : i + 1],))
                    for i in range(3)
                ]
            )
            texts = (together, EncodedText.cat(alone), EncodedText.cat([together.select([0]), *alone[1:]]))
            got = [family.velocity(family.base, x, t, text, references) for text in texts]
            order = torch.tensor([2, 0, 1])
            turned = family.velocity(family.base, x[order], t[order], together.select(order), (references[0][order],))
        for v in (*got, turned[torch.tensor([1, 2, 0])]):
            torch.testing.assert_close(v, wanted, atol=1e-5, rtol=0)

    # ------------------------------------------------------------------------------------------------- references

    def test_a_reference_changes_the_output(self, family):
        x, text, t = latents(family, 1), family.encode_text(PROMPTS[:1]), torch.tensor([0.7])
        with torch.no_grad():
            plain, one, other, again = (
                family.velocity(family.base, x, t, text, refs)
                for refs in ((), (latents(family, 1, seed=1),), (latents(family, 1, seed=2),), ())
            )
        assert plain.shape == one.shape == x.shape
        assert (plain - one).abs().max() > 1e-4
        assert (one - other).abs().max() > 1e-4
        assert torch.equal(plain, again)  # nothing stays behind in the net

    def test_several_references_of_several_sizes_in_order(self, family):
        x, text, t = latents(family, 2), family.encode_text(PROMPTS), torch.tensor([0.7, 0.2])
        a, b, c = latents(family, 2, seed=1), latents(family, 2, 16, 16, seed=2), latents(family, 2, 32, 16, seed=3)
        with torch.no_grad():
            outs = [family.velocity(family.base, x, t, text, refs) for refs in ((a,), (a, b), (b, a), (a, b, c))]
        assert all(o.shape == x.shape for o in outs)
        for one, other in zip(outs, outs[1:]):
            assert (one - other).abs().max() > 1e-5

    def test_two_equal_sized_references_are_told_apart(self, family):
        x, text, t = latents(family, 1), family.encode_text(PROMPTS[:1]), torch.tensor([0.7])
        a, b = latents(family, 1, seed=1), latents(family, 1, seed=2)
        with torch.no_grad():
            one, other = (family.velocity(family.base, x, t, text, refs) for refs in ((a, b), (b, a)))
        assert (one - other).abs().max() > 1e-5

    def test_gradient_flows_to_everything(self, family):
        net = family.trainable_net()
        x, t, text = latents(family, 1).requires_grad_(), torch.tensor([0.5]), family.encode_text(PROMPTS[:1])
        references = [latents(family, 1, seed=s).requires_grad_() for s in (1, 2)]
        family.velocity(net, x, t, text, references).square().sum().backward()
        for tensor in (x, *references):
            assert tensor.grad is not None and tensor.grad.abs().sum() > 0
        assert [n for n, p in net.named_parameters() if p.grad is None] == self.without_gradient(net)
        assert all(p.grad is None and not p.requires_grad for p in family.base.parameters())

    def without_gradient(self, net: nn.Module) -> list[str]:
        """The weights that this family's net has and does not use."""
        return []

    def test_a_gradient_with_respect_to_a_reference_is_right(self, family):
        """Its length, against a finite difference along it."""
        net = family.trainable_net().double()
        x, t, text = latents(family, 1).double(), torch.tensor([0.5]), family.encode_text(PROMPTS[:1])
        reference = latents(family, 1, seed=1).double().requires_grad_()

        def out(at: Tensor) -> Tensor:
            return family.velocity(net, x, t, text, (at,)).square().sum()

        (gradient,) = torch.autograd.grad(out(reference), reference)
        with torch.no_grad():
            step = 0.01 * gradient / gradient.norm()
            measured = (out(reference + step) - out(reference - step)) / 0.02
        torch.testing.assert_close(gradient.norm(), measured, rtol=2e-2, atol=0)

    def test_checkpointing_changes_nothing(self, family):
        net, text = family.trainable_net(), family.encode_text(PROMPTS)
        x, t, references = latents(family, 2), torch.tensor([0.5, 0.9]), (latents(family, 2, seed=1),)
        found = []
        for on in (False, True):
            if on:
                net.enable_gradient_checkpointing()
            net.zero_grad()
            v = family.velocity(net, x, t, text, references)
            v.square().sum().backward()
            found.append([v.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
        assert len(found[0]) == len(found[1])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    # ------------------------------------------------------------------------------------------ schedule, VAE, facts

    @pytest.mark.parametrize("shift", [1.0, 1.6, 3.0])
    def test_the_saved_scheduler_makes_the_few_step_times(self, family, shift):
        scheduler = family.few_step_scheduler(shift)
        scheduler.set_timesteps(sigmas=GRID)
        torch.testing.assert_close(scheduler.sigmas[:-1], flow.few_step_times(4, shift), atol=1e-6, rtol=0)
        assert scheduler.config.stochastic_sampling

    def test_encoding_is_the_posteriors_mean_in_float32(self, family):
        z = family.encode(pictures(2))
        shape = (2, family.facts.channels, HEIGHT // family.facts.stride, WIDTH // family.facts.stride)
        assert z.shape == shape and z.dtype is torch.float32 and not z.requires_grad
        assert torch.equal(family.encode(pictures(2)), z)  # no draw
        torch.testing.assert_close(family.encode(pictures(2)[1:]), z[1:], atol=1e-5, rtol=0)

    def test_decoding_passes_gradient_and_is_not_clamped(self, family):
        x = (3 * latents(family, 1)).requires_grad_()
        image = family.decode(x)
        assert image.shape == (1, 3, HEIGHT, WIDTH)
        image.square().sum().backward()
        assert x.grad.abs().min() > 0
        assert all(p.grad is None for p in family.pipe.vae.parameters())
        assert image.min() < 0 and image.max() > 1

    def test_facts_are_those_of_the_parts(self, family):
        facts, names = family.facts, dict(family.base.named_modules())
        assert all(len(names[b]) for b in facts.blocks)
        side = facts.multiple  # the smallest picture there is
        z = family.encode(pictures(1, side, 2 * side))
        assert z.shape == (1, facts.channels, side // facts.stride, 2 * side // facts.stride)
        with torch.no_grad():
            v = family.velocity(family.base, z, torch.tensor([0.5]), family.encode_text(["x"]), (z,))
        assert v.shape == z.shape and family.decode(z).shape == (1, 3, side, 2 * side)

    # -------------------------------------------------------------------------------------------- nets and folders

    def test_a_net_is_a_trainable_copy(self, family):
        net = family.trainable_net()
        assert net.training and all(p.requires_grad for p in net.parameters())
        before = [p.clone() for p in family.base.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1)
        assert all(torch.equal(a, b) for a, b in zip(before, family.base.parameters()))

    def test_a_net_is_saved_and_opened(self, family, tmp_path):
        net = family.trainable_net()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.01)
        net.save_pretrained(tmp_path / "transformer")
        opened = family.open_net(tmp_path / "transformer")
        plain = type(net).from_pretrained(tmp_path / "transformer")  # diffusers alone opens it too
        x, t, text = latents(family, 1), torch.tensor([0.5]), family.encode_text(PROMPTS[:1])
        with torch.no_grad():
            outs = [family.velocity(n, x, t, text) for n in (net, opened, plain, family.base)]
        for same in (opened, plain):
            assert all(torch.equal(p, same.state_dict()[name]) for name, p in net.state_dict().items())
        # Not bitwise: weights mapped from a file are not aligned, and some CPUs then round otherwise.
        for out in outs[1:3]:
            torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=0)
        assert not torch.allclose(outs[0], outs[3], atol=1e-3)
