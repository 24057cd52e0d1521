"""What the tests of exports share."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers.utils import dynamic_modules_utils


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers copies a pipeline's file to a folder before it runs it: not to the one of this computer's user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
