"""An image editor on Z-Image, trained with npedit: `DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER,
trust_remote_code=True)`.

The references are further images of the net's omni mode, as in diffusers' `ZImageOmniPipeline` but without SigLIP
states and with an empty piece of caption before each of them. Their tokens are modulated with the clean time. The
picture lies after the caption with its padding to a multiple of 32 tokens, as in text-to-image. A net whose config says
`"_references": "frames"` takes one reference and the picture as two frames of one film, after a prompt whose template
ends in an empty thought. Isolated references attend to themselves alone, and one pass over them serves all steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import ZImagePipeline
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from npedit.export.pipelines.few_step import FewStepEditing
from npedit.families._isolated import (
    ReferenceKVCache,
    ZImageReferenceAttnProcessor,
    attend_to_references,
    cache_references,
    z_image_frames_after,
)


class NPEditPipeline(FewStepEditing, ZImagePipeline):
    """Z-Image as a few-step image editor; see `__call__`."""

    _text_length = 512  # in tokens, ZImagePipeline's own
    _block = SEQ_MULTI_OF  # the net pads captions and images to multiples of it
    _omni_image_ids = 4  # where `patchify_and_embed_omni` returns the position ids of all images

    def __init__(
        self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any, editor: Any = None
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_to_config(editor=editor)

    @property
    def _takes_frames(self) -> bool:
        return self.transformer.config.get("_references") == "frames"

    @property
    def _most_references(self) -> int:
        return 1 if self._takes_frames else 16

    def _encode_text(self, prompts: list[str], device: torch.device) -> Any:
        """The states (length, d) of each prompt, without padding."""
        if self._takes_frames:
            return self._encode_without_thinking(prompts, device)
        settings = {"do_classifier_free_guidance": False, "max_sequence_length": self._text_length}
        return self.encode_prompt(list(prompts), device, **settings)[0]

    def _encode_without_thinking(self, prompts: list[str], device: torch.device) -> list[torch.Tensor]:
        turn = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        texts = [self.tokenizer.apply_chat_template([{"role": "user", "content": p}], **turn) for p in prompts]
        found = self.tokenizer(
            texts, padding="max_length", max_length=self._text_length, truncation=True, return_tensors="pt"
        ).to(device)
        mask = found.attention_mask.bool()
        out = self.text_encoder(input_ids=found.input_ids, attention_mask=mask, output_hidden_states=True)
        return [states[kept] for states, kept in zip(out.hidden_states[-2], mask)]

    def _prepare_references(self, references: list[torch.Tensor], text: Any) -> Any:
        """The latents, or the KV cache of isolated references, whose pass has empty captions."""
        if not self.config.editor.get("isolated_references"):
            return references
        dtype, count, items = self.transformer.dtype, len(references), len(text)
        planes = [plane.to(dtype).unsqueeze(2) for plane in references]
        call = partial(
            self.transformer,
            x=[list(item) for item in zip(*planes)],
            t=torch.ones(items, device=planes[0].device),
            cap_feats=[[text[0][:0].to(dtype)] * count] * items,
            siglip_feats=[None] * items,
            image_noise_mask=[[0] * count] * items,
            return_dict=False,
        )
        return cache_references(self.transformer, ZImageReferenceAttnProcessor, count, lambda: torch.stack(call()[0]))

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, text: Any, references: Any) -> torch.Tensor:
        """v (b, c, h, w) at x and the times t (b,) in [0, 1]. The net's time is 1 - t, and its output is -v."""
        dtype = self.transformer.dtype
        captions = [states.to(dtype) for states in text]
        if isinstance(references, ReferenceKVCache):
            return -self._run_with_cache(x.to(dtype), t.float(), captions, references).squeeze(2)
        planes = [plane.to(dtype).unsqueeze(2) for plane in (*references, x)]
        run = self._run_frames if self._takes_frames else self._run_omni
        return -torch.stack(run(planes, t.float(), captions)).squeeze(2)

    def _run_with_cache(
        self, x: torch.Tensor, t: torch.Tensor, captions: list[torch.Tensor], cache: ReferenceKVCache
    ) -> torch.Tensor:
        """The net's output (b, c, 1, h, w) on the picture x (b, c, h, w), which attends to the cached references."""
        planes = list(x.unsqueeze(2).unbind())
        call = partial(self.transformer, x=planes, t=1 - t, cap_feats=captions, return_dict=False)
        with z_image_frames_after(self.transformer, cache.count):
            return attend_to_references(
                self.transformer, ZImageReferenceAttnProcessor, cache, lambda: torch.stack(call()[0])
            )

    def _run_omni(
        self, planes: list[torch.Tensor], t: torch.Tensor, captions: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The net's outputs, each (c, 1, h, w); the last of the planes (b, c, 1, h, w) is the picture."""
        count = len(planes) - 1
        tokens = planes[-1].shape[3] * planes[-1].shape[4] // 4
        with self._picture_after_padded_caption(tokens, [len(caption) for caption in captions]):
            return self.transformer(
                x=[list(item) for item in zip(*planes)],
                t=1 - t,
                cap_feats=[[caption[:0]] * count + [caption] for caption in captions],
                siglip_feats=[None] * len(t),
                image_noise_mask=[[0] * count + [1]] * len(t),
                return_dict=False,
            )[0]

    @contextmanager
    def _picture_after_padded_caption(self, tokens: int, lengths: list[int]) -> Iterator[None]:
        """Inside the block, the net gives the picture the frame after the padded caption. `tokens` is the picture's
        number of tokens, `lengths` are those of the captions without padding."""
        net = self.transformer
        unchanged, block = net.patchify_and_embed_omni, self._block

        def patchify(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            parts = list(unchanged(*args, **kwargs))
            places = []
            for ids, length in zip(parts[self._omni_image_ids], lengths):
                ids, first = ids.clone(), len(ids) + -tokens // block * block
                ids[first : first + tokens, 0] += -length % block
                places.append(ids)
            parts[self._omni_image_ids] = places
            return tuple(parts)

        net.patchify_and_embed_omni = patchify
        try:
            yield
        finally:
            del net.patchify_and_embed_omni

    def _run_frames(
        self, planes: list[torch.Tensor], t: torch.Tensor, captions: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The net's outputs, each (c, 1, h, w), for films of the reference and the picture."""
        films = list(torch.cat(planes, 2))
        with self._modulate_frames(planes[0].shape[3] * planes[0].shape[4] // 4, t):
            out = self.transformer(x=films, t=1 - t, cap_feats=captions, return_dict=False)[0]
        return [film[:, 1:] for film in out]

    @contextmanager
    def _modulate_frames(self, tokens: int, t: torch.Tensor) -> Iterator[None]:
        """Inside the block, the net modulates the first `tokens` tokens of each film with the clean time."""
        net = self.transformer
        clean = net.t_embedder(torch.ones_like(t) * net.t_scale)

        def modulation(x: torch.Tensor, noisy_time: torch.Tensor) -> tuple[torch.Tensor, ...]:
            noisy = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
            noisy[:, :tokens] = 0
            return noisy, noisy_time, clean.to(noisy_time)

        def before_block(_: Any, args: Any) -> tuple[Any, ...]:
            return *args[:4], *modulation(args[0], args[3])

        def before_last(_: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
            mask, noisy_time, clean_time = modulation(args[0], kwargs["c"])
            return args, {"noise_mask": mask, "c_noisy": noisy_time, "c_clean": clean_time}

        hooks = [layer.register_forward_pre_hook(before_block) for layer in (*net.noise_refiner, *net.layers)]
        last = net.all_final_layer.values()
        hooks += [layer.register_forward_pre_hook(before_last, with_kwargs=True) for layer in last]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
