"""Where commands print: results on standard output, all else on standard error. Lines are not wrapped."""

from __future__ import annotations

from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
