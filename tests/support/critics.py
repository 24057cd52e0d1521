"""One tiny critic of each family whose chat template puts pictures before words, as published models have it."""

from __future__ import annotations

from collections.abc import Callable

from npedit.critics.base import Critic
from npedit.critics.internvl import InternVL
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.critics.qwen_vl import QwenVL
from npedit.critics.smolvlm import SmolVLM

PICTURES_FIRST = (  # the published LLaVA-OneVision's order, in the words of the tiny tokenizer
    "{% for turn in messages %}make {% for part in turn['content'] %}{% if part['type'] == 'image' %} <image> "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} answer {% endif %}"
)


def llava_with_pictures_first(seed: int) -> LlavaOnevision:
    tiny = LlavaOnevision.tiny(seed)
    return LlavaOnevision(tiny.model, tiny.tokenizer, tiny.processor, PICTURES_FIRST, tiny.device)


MAKERS: dict[str, Callable[[int], Critic]] = {
    "internvl": InternVL.tiny,
    "llava_onevision": llava_with_pictures_first,
    "qwen2_5_vl": lambda seed: QwenVL.tiny(seed, "qwen2_5_vl"),
    "qwen3_vl": lambda seed: QwenVL.tiny(seed, "qwen3_vl"),
    "smolvlm": SmolVLM.tiny,
}
