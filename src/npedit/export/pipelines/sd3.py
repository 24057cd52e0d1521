"""An image editor on Stable Diffusion 3, trained with npedit: `DiffusionPipeline.from_pretrained(FOLDER,
custom_pipeline=FOLDER, trust_remote_code=True)`.

The references go through the net's patch embedding, with the position codes of places next to the picture: right, else
below, left, above, on the first free side where the table of codes has room. Their tokens follow those of the picture,
and are removed before the last norm. Hooks, which exist during one call only, do this around the net's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from npedit.export.pipelines.few_step import FewStepEditing


class NPEditPipeline(FewStepEditing, StableDiffusion3Pipeline):
    """Stable Diffusion 3 and 3.5 as a few-step image editor; see `__call__`."""

    _optional_components = ["image_encoder", "feature_extractor", "text_encoder_3", "tokenizer_3"]
    _most_references = 4  # one on each side of the picture
    _text_length = 256  # of T5, in tokens; StableDiffusion3Pipeline's own

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        text_encoder_3: Any,
        tokenizer_3: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        editor: Any = None,
    ) -> None:
        super().__init__(
            transformer, scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, text_encoder_3,
            tokenizer_3, image_encoder, feature_extractor,
        )  # fmt: skip
        self.register_to_config(editor=editor)

    @property
    def _multiple(self) -> int:
        return self.vae_scale_factor * self.transformer.config.patch_size

    def _encode_text(self, prompts: list[str], device: torch.device) -> Any:
        """CLIPs' and T5's states (b, length, d) and the CLIPs' pooled vectors (b, p)."""
        longest = self._text_length if self.tokenizer_3 is None else self.tokenizer_3.model_max_length
        sequence, _, pooled, _ = self.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False,
            max_sequence_length=min(self._text_length, longest),
        )  # fmt: skip
        return sequence, pooled

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, text: Any, references: list[torch.Tensor]) -> torch.Tensor:
        (sequence, pooled), dtype = text, self.transformer.dtype
        with self._attach(x, [r.to(dtype) for r in references]):
            return self.transformer(
                hidden_states=x.to(dtype),
                timestep=1000 * t.float(),
                encoder_hidden_states=sequence.to(dtype),
                pooled_projections=pooled.to(dtype),
                return_dict=False,
            )[0]

    @contextmanager
    def _attach(self, x: torch.Tensor, references: list[torch.Tensor]) -> Iterator[None]:
        """Inside the block, a call of the net on x (b, c, h, w) sees the references (b, c, h', w') beside it."""
        net, patch = self.transformer, self.transformer.config.patch_size
        embed, side = net.pos_embed, net.pos_embed.pos_embed_max_size
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        sizes = [(r.shape[2] // patch, r.shape[3] // patch) for r in references]
        corners = self._place(rows, columns, sizes, side)

        def append(_: Any, args: Any, tokens: torch.Tensor) -> torch.Tensor:
            table = embed.pos_embed.view(side, side, -1)
            for reference, (top, left) in zip(references, corners):
                grid = embed.proj(reference).permute(0, 2, 3, 1)
                grid = grid + table[top : top + grid.shape[1], left : left + grid.shape[2]]
                tokens = torch.cat([tokens, grid.flatten(1, 2).to(tokens.dtype)], 1)
            return tokens

        def drop(_: Any, args: Any) -> Any:
            return args[0][:, : rows * columns], *args[1:]

        hooks = [embed.register_forward_hook(append), net.norm_out.register_forward_pre_hook(drop)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _place(rows: int, columns: int, sizes: list[tuple[int, int]], side: int) -> list[tuple[int, int]]:
        """Where in the table of position codes each reference's first patch lies; the picture is in the middle."""
        top, left = (side - rows) // 2, (side - columns) // 2
        free, corners = ["right", "below", "left", "above"], []
        for high, wide in sizes:
            middle = (side - high) // 2, (side - wide) // 2
            at = {
                "right": (middle[0], left + columns),
                "below": (top + rows, middle[1]),
                "left": (middle[0], left - wide),
                "above": (top - high, middle[1]),
            }
            fitting = [s for s in free if min(at[s]) >= 0 and at[s][0] + high <= side and at[s][1] + wide <= side]
            if not fitting:
                raise ValueError(f"expected references that fit beside the picture; got {sizes} patches; take fewer")
            free.remove(fitting[0])
            corners.append(at[fitting[0]])
        return corners
