"""The contract of a judge: a vision-language model that answers questions about pictures in words, without gradients.

Every question ends in one of the outcomes below. Only an answer with the outcome "ok" can become a score. All other
outcomes are missing answers: they are counted and shown, and never become a number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from npedit.errors import UserError

OK = "ok"
PARSE_ERROR = "parse_error"  # the answer does not hold as many scores as were asked for
RANGE_ERROR = "range_error"  # a score is outside the scale
REFUSED = "refused"  # the judge, or a content filter, refuses this item
REJECTED = "rejected"  # the server does not accept this request (too long, too large)
TRANSPORT_ERROR = "transport_error"  # no answer after the last attempt
MAX_FAILURES_IN_A_ROW = 8  # requests without an answer; then the model counts as unavailable
MISSING_IMAGE = "missing_image"  # the edited picture is missing or broken; the judge was not asked
NOT_IN_FILE = "not_in_file"  # an imported file of scores has none for this item
FINAL_OUTCOMES = (OK, REFUSED)  # asking again would give the same

FAMILY_BY_NAME_PART = {  # part of a model's name -> the file in critics/ that opens such models
    "llava-onevision": "llava_onevision", "internvl": "internvl", "smolvlm": "smolvlm",
    "qwen2.5-vl": "qwen_vl", "qwen2-5-vl": "qwen_vl", "qwen3-vl": "qwen_vl", "qwen2-vl": "qwen_vl",
}  # fmt: skip


@dataclass(frozen=True)
class RequestSettings:
    """How a protocol's questions are sent. A `temperature` or `max_tokens` of None is not sent, so that the server's
    default is used. With `answer_choices`, such as ("0", ..., "5"), no text is generated: the probability of each
    choice as the first token is read from the logits."""

    temperature: float | None
    max_tokens: int | None
    text_first: bool = False
    jpeg_quality: int = 0  # of pictures sent to a server; 0 sends PNG
    answer_choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A judge's answer to one question. `outcome` is ok, refused, rejected or transport_error. Whether the text holds
    scores is decided by the protocol. `usage` are the server's token counts. `detail` is for people."""

    outcome: str
    text: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    detail: str = ""
    served_by: str = ""  # the model's name in the server's answer
    address: str = ""  # the server that answered, where there are several


class JudgeUnavailable(UserError):
    """The judge cannot answer any question: a wrong key or model, no credit left, or a server that is gone."""


class JudgeModel(ABC):
    """A model that judges edits. `workers` is the number of questions that can be asked at once."""

    name: str
    workers: int = 1

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What an answer depends on besides the question: model, revision, precision, request parameters. This is part
        of every cache key and is written to every result."""

    @property
    def address(self) -> str:
        """The server's address, recorded with each answer; "" for a model in this process."""
        return ""

    @abstractmethod
    def check_supported(self, settings: RequestSettings) -> None:
        """Check, before the first question, that the judge supports these settings.

        Raises:
            UserError: the judge does not support them.
        """

    @abstractmethod
    def ask(self, prompt: str, images: Sequence[Image.Image], settings: RequestSettings) -> Reply:
        """The answer to one question about RGB pictures.

        Raises:
            JudgeUnavailable: the judge cannot answer any question.
        """

    def stop_retrying(self) -> None:  # noqa: B027 (a local judge has nothing to do)
        """End the retries of questions in other threads. Called when the run ends early."""


def guess_critic_family(model: str) -> str:
    """The file in critics/ that opens a model with this name; "" if the name does not say."""
    plain = model.lower().replace("_", "-")
    return next((family for mark, family in FAMILY_BY_NAME_PART.items() if mark in plain), "")
