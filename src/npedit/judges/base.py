"""What scores edits without giving gradients: a judge is asked about pictures and answers in words, or not at all.

Every attempt ends in one of the outcomes below. Only "ok" holds a number; all others are missing answers, counted and
shown, and never become a number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from npedit.errors import UserError

OK = "ok"
PARSE_ERROR = "parse_error"  # an answer came; no scores, or not as many as were asked for, can be read in it
RANGE_ERROR = "range_error"  # scores outside the scale
REFUSED = "refused"  # the judge, or a filter before it, will not look at this item
REJECTED = "rejected"  # the server takes other requests, but not this one (too long, too large)
TRANSPORT_ERROR = "transport_error"  # no answer came, however often it was asked
MISSING_IMAGE = "missing_image"  # the editor left no picture, or a broken one: the judge was not asked
NOT_IN_FILE = "not_in_file"  # scores were read from a file, which has none for this item
FINAL_OUTCOMES = (OK, REFUSED)  # of a reply: asking again would bring no more

FAMILY_BY_NAME_PART = {  # what stands in a model's name -> the file in critics/ that opens its kind
    "llava-onevision": "llava_onevision", "internvl": "internvl", "smolvlm": "smolvlm",
    "qwen2.5-vl": "qwen_vl", "qwen2-5-vl": "qwen_vl", "qwen3-vl": "qwen_vl", "qwen2-vl": "qwen_vl",
}  # fmt: skip


@dataclass(frozen=True)
class RequestSettings:
    """How a protocol wants its questions put. A `temperature` or `max_tokens` of None is not sent: the server's own
    holds. With `options`, such as ("0", ..., "5"), nothing is written: the probabilities of these words as the answer
    are read."""

    temperature: float | None
    max_tokens: int | None
    text_first: bool = False
    jpeg_quality: int = 0  # of the pictures sent to a server; 0 sends PNG
    answer_choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """One attempt's end: `outcome` is ok, refused, rejected or transport_error; whether the text holds scores is for
    the protocol to say. `usage` are the server's token counts; `detail` is for people."""

    outcome: str
    text: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    detail: str = ""
    served_by: str = ""  # the model that the server says has answered


class JudgeUnavailable(UserError):
    """No further question makes sense: a wrong key or model, no credit left, or a server that is gone."""


class JudgeModel(ABC):
    """See the module's head. `workers` is how many questions it takes at once."""

    name: str
    workers: int = 1

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What its answers depend on beside the question: model, revision, where and in what precision it runs. Part of
        every cache key, and written beside every result."""

    @property
    def address(self) -> str:
        """Where its answers come from, recorded with each of them; "" in this process."""
        return ""

    @abstractmethod
    def check_supported(self, settings: RequestSettings) -> None:
        """Check once, before any question, that it can be asked with these settings.

        Raises:
            UserError: it cannot.
        """

    @abstractmethod
    def ask(self, prompt: str, images: Sequence[Image.Image], settings: RequestSettings) -> Reply:
        """One answer about RGB pictures.

        Raises:
            JudgeUnavailable: no further question makes sense.
        """

    def stop_retrying(self) -> None:  # noqa: B027 (most have nothing to do)
        """Told when the run ends early: questions under way in other threads need not be tried again."""


def guess_critic_family(model: str) -> str:
    """The file in critics/ that opens models of this name's kind, or "" if the name does not tell."""
    plain = model.lower().replace("_", "-")
    return next((family for mark, family in FAMILY_BY_NAME_PART.items() if mark in plain), "")
