"""Folders of runs for `npedit serve`: each run has the editor of the package, under the toy's recipe."""

import json
import shutil

import yaml

from npedit.recipe.config import embedded_weights, load_recipe
from npedit.recipe.packaged import recipe_path


def make_runs(folder, *names):
    """A folder of finished runs; the last name is that of the newest."""
    recipe = load_recipe(recipe_path("toy")).as_dict()
    for name in names:
        run = folder / name
        shutil.copytree(embedded_weights("editor"), run / "final")
        (run / "config.resolved.yaml").write_text(yaml.safe_dump(recipe))
        (run / "manifest.json").write_text(json.dumps({"recipe": "toy", "no_pairs": True}))
        (run / "metrics.jsonl").write_text("")
    return folder
