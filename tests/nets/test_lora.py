"""LoRA: one base, three roles; the teacher stays as it was, bit for bit; what is saved opens in diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from npedit.editor import Editor
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.nets.learner import Learner, LearnerSettings
from npedit.nets.lora import WEIGHTS_FILE, LoraAdapter
from npedit.nets.master_weights import master_weight
from npedit.recipe.config import LoraChoice, make_recipe
from npedit.runs import checkpoint
from npedit.steps.base import Parts
from npedit.steps.np_edit import NpEditSettings, Step
from npedit.training import trainer
from tests.support.parts import batch, nudge, parts, trained, weights


def latents(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def velocity(made: Parts, net: nn.Module) -> Tensor:
    """v for two fixed items with a reference."""
    text = made.family.encode_text(["make it night", "remove the dog"])
    return made.family.velocity(net, latents(), torch.tensor([0.9, 0.4]), text, (latents(seed=1),))


def gradients(made: Parts, net: nn.Module) -> list[Tensor]:
    """Of the two-step unroll's size, with other roles called before the backward pass, as in a training step."""
    first = velocity(made, net)
    text = made.family.encode_text(["a", "b"])
    second = made.family.velocity(net, latents() - first, torch.tensor([0.6, 0.6]), text)
    with torch.no_grad():
        velocity(made, made.family.base)
        velocity(made, made.create_trainable("fake", 1))
    return list(torch.autograd.grad(second.square().mean(), trained(net)))


# ------------------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    made = parts(critic=False, lora=True)
    made.family.base.to(dtype)
    untouched = velocity(made, made.family.base)
    student = made.create_trainable("student", 0)
    assert torch.equal(velocity(made, student), untouched)
    assert torch.equal(velocity(made, made.family.base), untouched)
    assert {p.dtype for p in trained(student)} == {dtype}
    assert {master_weight(p).dtype for p in trained(student)} == {torch.float32}
    assert {p.dtype for p in made.family.base.parameters() if not p.requires_grad} == {dtype}
    nudge(student)
    assert not torch.allclose(velocity(made, student), untouched, atol=1e-4)
    assert torch.equal(velocity(made, made.family.base), untouched)
    Learner(student, LearnerSettings(), 1)
    assert torch.equal(velocity(made, made.family.base), untouched)


def test_the_teacher_stays_whatever_the_others_learn() -> None:
    made = parts(lora=True, gradient_checkpointing=True)
    untouched, before = velocity(made, made.family.base), weights(made.family.base)
    rates = {"student": LearnerSettings(lr=0.05), "fake": LearnerSettings(lr=0.05)}
    step = Step(
        NpEditSettings(fake_updates=2, critic_weight=0.5, **rates), made, made.create_trainable("student", 0), 10, 0
    )
    seen = {"teacher": untouched}
    for update in range(2):
        step.step([batch(0, 1), batch(2, 3)], update)
    for name, learner in step.learners.items():
        with learner.use_ema_weights() as net:
            seen[name] = velocity(made, net)
    assert torch.equal(velocity(made, made.family.base), untouched)
    assert torch.equal(weights(made.family.base), before)
    for a, b in (("teacher", "student"), ("teacher", "fake"), ("student", "fake")):
        assert (seen[a] - seen[b]).abs().max() > 1e-4, (a, b)


def test_gradient_reaches_the_own_adapter_alone() -> None:
    made = parts(critic=False, lora=True)
    nets = {"student": made.create_trainable("student", 0), "fake": made.create_trainable("fake", 0)}
    for seed, net in enumerate(nets.values()):
        nudge(net, seed)
    for name, net in nets.items():
        other = nets[{"student": "fake", "fake": "student"}[name]]
        velocity(made, net).square().mean().backward()
        velocity(made, other).detach()
        assert all(p.grad is not None and p.grad.any() for p in trained(net))
        assert all(p.grad is None for p in trained(other))
        assert {id(p) for p in made.family.base.parameters() if p.grad is not None} == {id(p) for p in trained(net)}
        net.zero_grad()
    assert not {id(p) for p in trained(nets["student"])} & {id(p) for p in trained(nets["fake"])}


def test_another_adapter_of_a_role_replaces_it() -> None:
    made = parts(critic=False, lora=True)
    student, old = made.create_trainable("student", 0), made.create_trainable("fake", 0)
    nudge(student)
    nudge(old)
    wanted = velocity(made, student)
    new = made.create_trainable("fake", 1)
    assert torch.equal(velocity(made, student), wanted)
    assert torch.equal(velocity(made, new), velocity(made, made.family.base))
    with pytest.raises(RuntimeError, match="fake.*replaced"):
        velocity(made, old)
    again = parts(critic=False, lora=True).create_trainable("fake", 1)
    assert torch.equal(weights(new), weights(again)) and not torch.equal(weights(new), weights(student))


def test_an_error_within_leaves_the_teacher_alone() -> None:
    made = parts(critic=False, lora=True)
    student, untouched = made.create_trainable("student", 0), velocity(made, made.family.base)
    nudge(student)
    with pytest.raises(RuntimeError):
        made.family.velocity(student, latents(), torch.zeros(2), made.family.encode_text(["a", "b", "c"]))
    assert torch.equal(velocity(made, made.family.base), untouched)


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_no_gradient(lora: bool) -> None:
    found, counts = [], []
    for on in (False, True):
        made = parts(critic=False, lora=lora, gradient_checkpointing=on)
        net, calls = made.create_trainable("student", 0), []
        block = net.single_transformer_blocks[0]
        block.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        nudge(net)
        found.append(gradients(made, net))
        counts.append(len(calls))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0]
    assert counts[1] == counts[0] + 2  # both calls of the student were made again


def test_a_checkpoint_blind_to_adapters_would_be_found() -> None:
    """Upside down: the model's own checkpointing runs the blocks again under whichever adapter is on by then."""
    made = parts(critic=False, lora=True)
    net = made.create_trainable("student", 0)
    nudge(net)
    net.enable_gradient_checkpointing()
    with pytest.raises(CheckpointError):
        gradients(made, net)


def test_a_model_without_gradient_checkpointing_is_told_so() -> None:
    made = parts(critic=False, gradient_checkpointing=True)
    made.family.base._supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="memory.gradient_checkpointing.*set it to false"):
        made.create_trainable("student", 0)


def test_each_distinct_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = parts(critic=False, cached_prompts=3), []
    real = made.family.encode_text
    monkeypatch.setattr(made.family, "encode_text", lambda prompts: asked.append(list(prompts)) or real(prompts))
    words = ["a", "", "a", "b"]
    text, again = made.encode_text(words), made.encode_text(["b", "", "a"])
    assert asked == [["a"], [""], ["b"]]
    for part, swapped, plain in zip(text.parts, again.parts, real(words).parts):
        torch.testing.assert_close(part, plain, atol=1e-5, rtol=1e-4)
        assert torch.equal(part[[3, 1, 0]], swapped)
    made.encode_text(["", "c"])  # one too many: the prompt that was not asked for longest goes
    assert len(made.prompts) == 3 and [text for text, _ in made.prompts] == ["a", "", "c"]
    made.encode_text(["1", "2", "3", "4", "1"])
    assert len(made.prompts) == 3
    assert len(parts(critic=False).prompts) == 0


def size_in_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_offloaded_parts_are_on_the_device_while_they_are_used_and_are_copied_there_once_an_update() -> None:
    """Each forward and backward pass through a frozen part happens inside a block of `on_device`. Nothing is copied
    back: the weights in host memory are the same storages before and after."""
    used, copies = set(), []
    made = replace(parts(offload=True), on_copy=lambda name, size: copies.append((name, size)))
    pipe, wrong = made.family.pipe, []
    inner = {"text": [pipe.text_encoder, pipe.text_encoder_2], "vae": [pipe.vae.encoder, pipe.vae.decoder],
             "critic": [made.critic.model.model.vision_tower, made.critic.model.lm_head]}  # fmt: skip

    def note(name: str) -> None:
        used.add(name)
        if name not in made.names_on_device:
            wrong.append(name)

    before = {name: p.data_ptr() for name, p in made.critic.model.named_parameters()}
    for name, modules in inner.items():
        for module in modules:
            module.register_forward_pre_hook(lambda *args, name=name: note(name))
    pipe.vae.decoder.register_full_backward_hook(lambda *args: note("vae"))
    made.critic.model.lm_head.register_full_backward_hook(lambda *args: note("critic"))
    step = Step(NpEditSettings(fake_updates=2), made, made.create_trainable("student", 0), 10, 0)
    step.step([batch(0, 1), batch(2, 3)], 0)
    assert used == {"text", "vae", "critic"} and not wrong and not made.names_on_device
    sizes = {"text": inner["text"], "vae": [pipe.vae], "critic": [made.critic.model]}
    assert sorted(copies) == sorted((n, size_in_bytes(m)) for n, modules in sizes.items() for m in modules)  # once each
    assert before == {name: p.data_ptr() for name, p in made.critic.model.named_parameters()}
    plain = parts()
    other = Step(NpEditSettings(fake_updates=2), plain, plain.create_trainable("student", 0), 10, 0)
    other.step([batch(0, 1), batch(2, 3)], 0)
    assert torch.equal(weights(step.learners["student"].net), weights(other.learners["student"].net))


def test_offloaded_text_encoders_stay_away_when_all_prompts_are_cached() -> None:
    copies = []
    made = replace(parts(offload=True, cached_prompts=100), on_copy=lambda name, size: copies.append(name))
    step = Step(NpEditSettings(fake_updates=2), made, made.create_trainable("student", 0), 10, 0)
    step.step([batch(0, 1), batch(2, 3)], 0)
    assert sorted(copies) == ["critic", "text", "text", "vae"]  # two text encoders
    step.step([batch(3, 1), batch(2, 0)], 1)
    assert sorted(copies[4:]) == ["critic", "vae"]


# ------------------------------------------------------------------------------------------- a whole run, and its end

STUDENT = {"lr": 0.01, "warmup_updates": 2}
RECIPE = {
    "name": "adapters",
    "family": {"name": "flux"},
    "lora": {"rank": 4, "alpha": 6.0},
    "memory": {"gradient_checkpointing": True, "offload": True, "cached_prompts": 8},
    "critic": {"name": "llava_onevision"},
    "data": {"name": "toy"},
    "stages": [
        {"step": "reference_copy", "updates": 1, "batch_size": 2, "settings": {"student": STUDENT, "steps": 2}},
        {"step": "np_edit", "updates": 2, "batch_size": 1,
         "settings": {"student": STUDENT, "fake": STUDENT, "fake_updates": 1, "steps": 2}},
    ],
    "trainer": {"save_every": 1, "keep": 9, "sample_items": 1, "steps": 2, "sample_every": 0, "evaluate_every": 0},
}  # fmt: skip


class Crash(Exception):
    """Ends a run without warning."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, as it lies on disk."""
    folder = tmp_path_factory.mktemp("models") / "base"
    Flux.tiny(0).pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run that nothing interrupted."""
    return train(base, tmp_path_factory.mktemp("runs") / "run")


def train(base: Path, run: Path, until: int = 99) -> Path:
    recipe = make_recipe(RECIPE | {"family": {"name": "flux", "weights": str(base)}})

    def on_event(name: str, facts: dict) -> None:
        if name == "update" and facts["step"] == until:
            raise Crash

    def small(made) -> Parts:
        return Parts(trainer.build_parts(made).family, parts().critic, "short", torch.device("cpu"), made.lora,
                     made.memory)  # fmt: skip

    return trainer.train(recipe, run, parts=small, on_event=on_event)


def state(run: Path, step: int) -> dict[str, Tensor]:
    return checkpoint.load_checkpoint(run / f"checkpoint-{step:06d}")[0]


def test_a_run_goes_on_bit_for_bit(whole: Path, base: Path, tmp_path: Path) -> None:
    for until in (1, 2):
        with pytest.raises(Crash):
            train(base, tmp_path / "run", until)
    train(base, tmp_path / "run")
    ours, wanted = state(tmp_path / "run", 3), state(whole, 3)
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[k], wanted[k]) for k in wanted)
    ours, wanted = (load_file(run / "final" / WEIGHTS_FILE) for run in (tmp_path / "run", whole))
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[k], wanted[k]) for k in wanted)


def test_checkpoints_hold_adapters_alone_and_the_next_stage_keeps_the_students(whole: Path) -> None:
    first, end = state(whole, 1), state(whole, 3)
    for found in (first, end):
        assert found and all("/lora_" in k for k in found if not k.startswith("extra/"))
    assert not [k for k in first if k.startswith("fake")] and [k for k in end if k.startswith("fake/net.")]
    names = [k.removeprefix("student/ema.") for k in first if k.startswith("student/ema.")]
    second = state(whole, 2)
    for name in names:  # one update at half of lr 0.01 away from the first stage's average
        torch.testing.assert_close(second[f"student/net.{name}"], first[f"student/ema.{name}"], atol=0.0051, rtol=0)
    assert any(first[f"student/ema.{n}"].any() for n in names if "lora_B" in n)


def opened_by_diffusers(base: Path, final: Path) -> Iterator[nn.Module]:
    """The transformer, the adapter loaded once by the pipeline, once by the model."""
    pipe = FluxPipeline.from_pretrained(base)
    pipe.load_lora_weights(final)
    yield pipe.transformer
    pipe = FluxPipeline.from_pretrained(base)
    pipe.transformer.load_lora_adapter(final, prefix="transformer", weight_name=WEIGHTS_FILE)
    yield pipe.transformer


def test_the_final_adapter_opens_in_diffusers_and_in_the_editor(whole: Path, base: Path) -> None:
    final, end = whole / "final", state(whole, 3)
    assert {p.name for p in final.iterdir()} == {WEIGHTS_FILE, "scheduler", "npedit.json", "README.md"}
    assert WEIGHTS_FILE in (final / "README.md").read_text()
    editor = Editor.open(whole, device="cpu")
    fresh = Parts(Flux.load(base, torch.float32, torch.device("cpu")), None, "short", torch.device("cpu"),
                  LoraChoice(rank=4, alpha=6.0))  # fmt: skip
    student = fresh.create_trainable("student", 0)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if p.requires_grad:
                p.copy_(end[f"student/ema.{name}"])
    wanted, untouched = velocity(fresh, student).detach(), velocity(fresh, fresh.family.base)
    assert (wanted - untouched).abs().max() > 1e-4
    assert isinstance(editor.net, LoraAdapter) and not trained(editor.net)
    torch.testing.assert_close(velocity(fresh, editor.net), wanted, atol=1e-6, rtol=0)
    for net in opened_by_diffusers(base, final):
        torch.testing.assert_close(velocity(fresh, net), wanted, atol=1e-6, rtol=0)
    assert torch.equal(
        velocity(fresh, editor.family.trainable_net()), untouched
    )  # "the start", which the demo compares with


def test_a_file_without_an_adapter_is_refused(whole: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "final", tmp_path / "final")
    save_file({"other": torch.zeros(1)}, tmp_path / "final" / WEIGHTS_FILE)
    with pytest.raises(UserError, match="expected keys that begin with transformer"):
        Editor.open(tmp_path / "final", device="cpu")


@pytest.mark.parametrize(
    ("bad", "said"), [({"rank": 0}, "lora.rank"), ({"rnk": 4}, "lora.rnk"), ({"alpha": 0}, "alpha")]
)
def test_settings_out_of_range(bad: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_recipe(RECIPE | {"lora": bad})
