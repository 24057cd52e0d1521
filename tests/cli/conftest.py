"""Tiny parts in the place of the embedded ones, and an empty working folder."""

import json

import pytest

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.families.flux import Flux
from npedit.recipe import config
from npedit.toy.words import vocabulary


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A base model, a critic and an editor with random weights, laid out as the embedded ones."""
    root = tmp_path_factory.mktemp("weights")
    family = Flux.tiny(0)
    family.pipe.save_pretrained(root / "base")
    LlavaOnevision.untrained(vocabulary()[4:], 0, vision=(32, 64, 1), text=(48, 96, 1)).save(root / "critic")
    family.trainable_net().save_pretrained(root / "editor" / "transformer")
    facts = {"format": 1, "family": "flux", "base": "embedded", "steps": 2, "sizes": [[32, 32]]}
    (root / "editor" / "npedit.json").write_text(json.dumps(facts))
    return root


@pytest.fixture
def here(parts, tmp_path, monkeypatch):
    """An empty working folder, and the tiny parts in the place of the package's own."""
    monkeypatch.setattr(config, "embedded_weights", lambda kind: parts / kind)
    monkeypatch.setenv("NPEDIT_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    return tmp_path
