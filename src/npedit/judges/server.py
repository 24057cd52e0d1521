"""A judge behind an HTTP server with OpenAI's chat completions API (`judges/chat_client.py`).

A request is one user message without a system message: pictures as data URLs and the text, in the protocol's order. The
API key comes from the environment variable NPEDIT_JUDGE_KEY.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from npedit.errors import UserError
from npedit.judges.base import JudgeModel, Reply, RequestSettings
from npedit.judges.chat_client import ChatClient, ServerNames, encode_data_url

API_KEY_VARIABLE = "NPEDIT_JUDGE_KEY"
NAMES = ServerNames("--judge", "--judge-model", (API_KEY_VARIABLE,), "judge")


class ServerJudge(JudgeModel):
    """See `ChatClient` for the parameters and errors. `revision` is recorded; `workers` requests run at once."""

    def __init__(
        self,
        url: str,
        model: str,
        revision: str = "",
        workers: int = 4,
        timeout: float = 180.0,
        max_attempts: int = 6,
        initial_backoff: float = 2.0,
        parameters: Mapping[str, Any] | None = None,
        on_retry: Callable[[str], None] = lambda line: None,
    ):
        self.client = ChatClient(url, model, NAMES, timeout, max_attempts, initial_backoff, parameters, on_retry)
        self.name, self.revision, self.workers = model, revision, workers

    @property
    def identity(self) -> dict[str, Any]:
        """See `JudgeModel.identity`. The address is not part of the identity, so that a server can move; each answer
        records the address."""
        found = {"kind": "server", "model": self.name, "revision": self.revision}
        return found | ({"parameters": self.client.parameters} if self.client.parameters else {})

    @property
    def address(self) -> str:
        """See `JudgeModel.address`."""
        return self.client.url

    def check_supported(self, settings: RequestSettings) -> None:
        """See `JudgeModel.check_supported`."""
        if settings.answer_choices:
            raise UserError(
                "expected a local judge: a score from logits needs the probabilities of all answers, which servers do "
                "not give; give a folder or Hub id as --judge, or choose another --protocol"
            )

    def ask(self, prompt: str, images: Sequence[Image.Image], settings: RequestSettings) -> Reply:
        """See `JudgeModel.ask`, and the head of `judges/chat_client.py` for outcomes."""
        pictures = [
            {"type": "image_url", "image_url": {"url": encode_data_url(im, settings.jpeg_quality)}} for im in images
        ]
        text = [{"type": "text", "text": prompt}]
        content = text + pictures if settings.text_first else pictures + text
        return self.client.complete(
            [{"role": "user", "content": content}], max_tokens=settings.max_tokens, temperature=settings.temperature
        )

    def stop_retrying(self) -> None:
        """See `JudgeModel.stop_retrying`."""
        self.client.stop_retrying()
