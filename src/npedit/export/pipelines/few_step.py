"""What the pipelines of all families share: pictures in, few-step sampling, pictures out.

`export/diffusers_folder.py` joins the file of a family and the files of npedit that it imports, such as this one, to
one `pipeline.py`, which imports nothing of npedit. diffusers runs every local `pipeline.py` in one Python module, so of
all families in one process the last one's names count: keep what differs between families inside the class
`NPEditPipeline`.
"""

from __future__ import annotations

import io
import math
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageCms, ImageOps


class FewStepEditing:
    """Few-step editing for a pipeline of diffusers: x_t = (1 - t) x0 + t eps with fresh noise at each step.

    A family's class adds the methods that fail here, and replaces others where the family differs. Its argument
    `editor`, which `model_index.json` holds, has the trained `sizes` as [height, width], the number of `steps`, and
    `schedule`, the settings of the base model's scheduler that give the noise shift.
    """

    # Members of diffusers' pipelines:
    config: Any
    scheduler: Any
    vae: Any
    vae_scale_factor: int
    image_processor: Any
    progress_bar: Any
    maybe_free_model_hooks: Any
    _execution_device: Any

    @property
    def _most_references(self) -> int:
        """How many pictures the model sees at most, the edited one included."""
        raise NotImplementedError

    @property
    def _multiple(self) -> int:
        """Heights and widths are multiples of this number of pixels. Here: 2 x 2 latents are one token."""
        return 2 * self.vae_scale_factor

    def _encode_text(self, prompts: list[str], device: torch.device) -> Any:
        """The encoded prompts, as `_velocity` takes them."""
        raise NotImplementedError

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, H, W) in [0, 1] -> normalised latents (b, c, h, w) in float32, the posterior's mean. Here: one shift
        and one scale for all channels."""
        mean = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist.mean.float()
        return (mean - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, 3, H, W), about [-1, 1]."""
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latents.to(self.vae.dtype)).sample

    def _prepare_references(self, references: list[torch.Tensor], text: Any) -> Any:
        """What `_velocity` takes as references at every step: their latents (b, c, h, w). An editor whose references
        are isolated reads them here once."""
        return references

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, text: Any, references: Any) -> torch.Tensor:
        """v (b, c, h, w) at x and the times t (b,) in [0, 1], where 1 is noise. `references` comes from
        `_prepare_references`."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | list[Image.Image],
        prompt: str | list[str],
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        references: list[Image.Image] | tuple[()] = (),
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> Any:
        """Edit pictures; returns `ImagePipelineOutput` with the edited pictures.

        `image` is a picture or a list of pictures (PIL), `prompt` an instruction or one for each picture. A picture is
        scaled to the trained size of the nearest shape, and its edit is scaled back to the picture's own size. With
        `height` and `width`, multiples of the model's patches, the edit has this size and is not scaled back; nor is it
        with an `output_type` other than "pil". Pictures of one call must have one working size.

        `generator` is a `torch.Generator` or one for each picture. `torch.Generator("cpu").manual_seed(N)` gives the
        noise of `npedit edit --seed N`; a list of them gives each picture the edit that it gets alone. `references` are
        further pictures that the model sees beside each picture, if it was trained with them.

        Raises:
            ValueError: pictures, prompts, generators or sizes do not fit together.
        """
        images, prompts = self._pair(image, prompt, generator)
        size = self._working_size(images, height, width)
        steps = self.config.editor["steps"] if num_inference_steps is None else num_inference_steps
        self._check_inputs(size, steps, references, callback_on_step_end_tensor_inputs)
        device, self._interrupt = self._execution_device, False
        text = self._encode_text(prompts, device)
        pictures = [
            [_resize(im, size) for im in images],
            *([_crop_to_fill(im, size)] * len(images) for im in references),
        ]
        given = [self._encode_images(_to_tensor(each).to(device)) for each in pictures]
        latents = randn_tensor(given[0].shape, generator=generator, device=device, dtype=torch.float32)
        references = self._prepare_references(given, text)
        latents = self._sample(latents, text, references, steps, size, generator, callback_on_step_end)
        edited = self._to_output(latents, output_type)
        if output_type == "pil" and height is None and width is None:
            edited = [_resize(new, (old.height, old.width)) for new, old in zip(edited, images)]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=edited) if return_dict else (edited,)

    def _sample(self, latents: Any, text: Any, given: Any, steps: int, size: Any, generator: Any, callback: Any) -> Any:
        """The clean latents (b, c, h, w) after all steps. The scheduler adds the fresh noise."""
        self.scheduler.set_shift(self._noise_shift(*size))
        self.scheduler.set_timesteps(sigmas=[n / steps for n in range(steps, 0, -1)], device=latents.device)
        self._num_timesteps = steps
        with self.progress_bar(total=steps) as bar:
            for i, timestep in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                t = self.scheduler.sigmas[i].expand(len(latents)).to(latents.device)
                v = self._velocity(latents, t, text, given).float()
                latents = self.scheduler.step(v, timestep, latents, generator=generator, return_dict=False)[0]
                if callback is not None:
                    latents = (callback(self, i, timestep, {"latents": latents}) or {}).get("latents", latents)
                bar.update()
        return latents

    def _to_output(self, latents: torch.Tensor, output_type: str) -> Any:
        """The edited pictures as `output_type` says: "pil", "np", "pt" or "latent"."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self._decode_latents(latents).float(), output_type=output_type)

    def _noise_shift(self, height: int, width: int) -> float:
        """The base model's noise shift for pictures of this size: fixed, or growing with the number of tokens."""
        schedule = self.config.editor["schedule"]
        if not schedule.get("use_dynamic_shifting"):
            return float(schedule["shift"])
        tokens = (height // self._multiple) * (width // self._multiple)
        rise = schedule["max_shift"] - schedule["base_shift"]
        slope = rise / (schedule["max_image_seq_len"] - schedule["base_image_seq_len"])
        mu = schedule["base_shift"] + slope * (tokens - schedule["base_image_seq_len"])
        return mu if schedule.get("time_shift_type") == "linear" else math.exp(mu)

    @staticmethod
    def _pair(image: Any, prompt: Any, generator: Any) -> tuple[list[Image.Image], list[str]]:
        """As many upright RGB pictures as instructions; one of either goes with all of the other."""
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        count = max(len(images), len(prompts))
        if not all(isinstance(words, str) for words in prompts):
            raise ValueError(f"expected an instruction, or a list of instructions; got {prompt!r}")
        if not images or not prompts or {len(images), len(prompts)} - {1, count}:
            raise ValueError(
                f"expected one prompt, or one for each picture; got {len(images)} pictures and {len(prompts)} prompts"
            )
        if isinstance(generator, (list, tuple)) and len(generator) != count:
            raise ValueError(f"expected a generator for each of {count} pictures; got {len(generator)}")
        images = [_to_rgb(im) for im in images]
        return images * (count // len(images)), prompts * (count // len(prompts))

    def _working_size(self, images: list[Image.Image], height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) of the editing in pixels."""
        if height is not None and width is not None:
            return height, width
        if height is not None or width is not None:
            raise ValueError("expected both height and width, or neither")
        sizes = {_nearest_size((im.height, im.width), self.config.editor["sizes"]) for im in images}
        if len(sizes) > 1:
            raise ValueError(f"expected pictures of one working size; got {sorted(sizes)}; give height and width")
        return sizes.pop()

    def _check_inputs(self, size: tuple[int, int], steps: int, references: Any, tensor_inputs: Any) -> None:
        if any(side < 1 or side % self._multiple for side in size):
            raise ValueError(f"expected height and width as multiples of {self._multiple}; got {size}")
        if steps < 1:
            raise ValueError(f"expected at least one step; got {steps}")
        if 1 + len(references) > self._most_references:
            raise ValueError(f"expected at most {self._most_references - 1} references; got {len(references)}")
        if set(tensor_inputs) - {"latents"}:
            raise ValueError(f"expected callback_on_step_end_tensor_inputs ['latents']; got {list(tensor_inputs)}")


class VideoVaeEditing(FewStepEditing):
    """For a VAE of videos with a mean and a standard deviation of each channel (Qwen-Image, Krea 2). A picture is a
    video of one frame."""

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, H, W) in [0, 1] -> latents (b, c, h, w) in float32, the posterior's mean, normalised per channel."""
        frames = (images * 2 - 1).to(self.vae.dtype).unsqueeze(2)
        latents = self.vae.encode(frames).latent_dist.mean[:, :, 0].float()
        mean, deviation = self._latent_statistics(latents)
        return (latents - mean) / deviation

    def _decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, 3, H, W) in [-1, 1]."""
        mean, deviation = self._latent_statistics(latents)
        frames = (latents * deviation + mean).to(self.vae.dtype).unsqueeze(2)
        return self.vae.decode(frames).sample[:, :, 0]

    def _latent_statistics(self, like: torch.Tensor) -> list[torch.Tensor]:
        """The mean and standard deviation of the latents in the data, each (1, c, 1, 1)."""
        config = self.vae.config
        return [torch.tensor(s).to(like).view(1, -1, 1, 1) for s in (config.latents_mean, config.latents_std)]


def _unpack_tokens(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Tokens (b, n, 4c) of 2 x 2 latents, of which the first are the picture's -> the picture's latents (b, c, h, w),
    with the shape of `like`."""
    b, c, rows, columns = len(like), like.shape[1], like.shape[2] // 2, like.shape[3] // 2
    latents = tokens[:, : rows * columns].view(b, rows, columns, c, 2, 2)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


def _to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB picture in sRGB; transparent parts become white."""
    if not isinstance(image, Image.Image) or image.mode.startswith(("I", "F")):
        raise ValueError(f"expected a PIL picture of 8 bits a channel; got {getattr(image, 'mode', type(image))}")
    profile, mode, image = image.info.get("icc_profile"), image.mode, ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    converted = _convert_profile(image, profile, mode) if profile else None
    return image.convert("RGB") if converted is None else converted


def _convert_profile(image: Image.Image, profile: bytes, mode: str) -> Image.Image | None:
    """The picture in sRGB; None if its colour profile is broken or is for another kind of picture. `mode` is the mode
    in which it was given."""
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        is_grey = source.profile.xcolor_space.strip() == "GRAY"
        if is_grey and mode not in ("1", "L", "LA", "La"):
            return None
        image = image.convert("L") if is_grey else image if image.mode == "CMYK" else image.convert("RGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def _nearest_size(size: tuple[int, int], trained: Any) -> tuple[int, int]:
    """The trained (height, width) of the nearest shape; of those, the nearest in area."""
    shape, area = math.log(size[0] / size[1]), math.log(size[0] * size[1])
    sizes = [(int(h), int(w)) for h, w in trained]
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - shape), 3), abs(math.log(s[0] * s[1]) - area)))


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale to (height, width): by averaging where that is a reduction by whole numbers, else with Lanczos."""
    if (image.height, image.width) == size:
        return image
    is_whole = image.height % size[0] == 0 and image.width % size[1] == 0
    return image.resize((size[1], size[0]), Image.Resampling.BOX if is_whole else Image.Resampling.LANCZOS)


def _crop_to_fill(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred crop of the shape of (height, width), scaled to it."""
    image, (height, width) = _to_rgb(image), size
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (max(left, 0), max(top, 0), min(left + width * scale, image.width), min(top + height * scale, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size -> (b, 3, H, W) in [0, 1]."""
    pixels = [torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8) for im in images]
    return torch.stack([p.view(im.height, im.width, 3) for p, im in zip(pixels, images)]).permute(0, 3, 1, 2) / 255
