"""What may change when a run is resumed: one decision for every setting of a recipe.

    free      does not touch the result
    recorded  allowed; changes the result by rounding or by other noise, or extends the run; the manifest lists setting,
              old, new, update
    refused   would make another training; train in a new folder, with `start:` to begin from this run's editor

`docs/resuming.md` shows the table, and a test holds the two equal.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from npedit.errors import UserError
from npedit.recipe.differences import differences

Kind = Literal["free", "recorded", "refused"]
ALONE = "with a cache each input is encoded by itself, which changes it by rounding"
SAME_PRODUCT = "batch_size x accumulate must keep its product; noise and items change"


@dataclass(frozen=True)
class Decision:
    """Whether the settings that match `pattern` may change. Dots separate keys; `*` matches any text."""

    pattern: str
    kind: Kind
    reason: str


DECISIONS = (  # the first pattern that matches decides
    Decision("name", "free", "a label"),
    Decision("seed", "refused", "other data order and noise"),
    Decision("family.isolated_references", "refused", "the student would see its references in another way"),
    Decision("family*", "refused", "another base model, or another number type of it"),
    Decision("start", "refused", "read once, before the first update"),
    Decision("lora*", "refused", "other trainable weights"),
    Decision("critic.bits", "recorded", "the critic's answers change by rounding"),
    Decision("critic.dtype", "recorded", "the critic's answers change by rounding"),
    Decision("critic*", "refused", "another critic, or other questions"),
    Decision("judge*", "recorded", "its curve before and after cannot be compared; training is untouched"),
    Decision("data.path", "free", "a moved folder; the data's fingerprint must be the same"),
    Decision("data.prefetch", "free", "speed only"),
    Decision("data.max_bad_share", "free", "the share of bad rows at which the run stops"),
    Decision("data.held_out", "refused", "rows that were trained on would be held out, or the reverse"),
    Decision("data*", "refused", "other training data"),
    Decision("stages.*.updates", "recorded", "last stage only, and not below what is done; a cosine schedule follows "
             "the new length from the next update on"),
    Decision("stages.*.batch_size", "recorded", SAME_PRODUCT),
    Decision("stages.*.accumulate", "recorded", SAME_PRODUCT),
    Decision("stages.*.settings.*.max_skipped", "free", "the number of skipped updates at which the run stops"),
    Decision("stages*", "refused", "another method, or other settings of it"),
    Decision("trainer.steps", "refused", "another few-step editor"),
    Decision("trainer.shard", "recorded", "sums change by rounding"),
    Decision("trainer.by_failure*", "refused", "other items would be drawn"),
    Decision("trainer.*", "free", "how often the run samples, evaluates and saves, and where it logs"),
    Decision("memory.decode_tile", "recorded", "decoded images change at the edges of tiles"),
    Decision("memory.packed_questions", "recorded", "the critic's answers change by rounding"),
    Decision("memory.cached_latents", "recorded", ALONE),
    Decision("memory.cached_prompts", "recorded", ALONE),
    Decision("memory.*", "free", "memory against time"),
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A change to be recorded: `update` is the number of updates done before it."""

    setting: str
    old: Any
    new: Any
    update: int
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The change as the manifest lists it."""
        return {key: value for key, value in asdict(self).items() if value != ""}


def decision_for(setting: str) -> Decision:
    """The decision for a dotted setting such as "stages.0.updates". A setting that no pattern knows is refused."""
    return next(
        (d for d in DECISIONS if fnmatchcase(setting, d.pattern)),
        Decision(setting, "refused", "not known to be harmless"),
    )


def recorded_changes(old: Mapping[str, Any], new: Mapping[str, Any], done: int, run: Path) -> list[Change]:
    """The changes between two recipes (as `Recipe.as_dict` gives them) that have to be recorded; `done` is the number
    of updates that the run has made.

    Raises:
        UserError: there are changes that are refused; all of them are listed, with the way out.
    """
    recorded, refused = [], []
    for setting, (before, after) in differences(old, new).items():
        decision = decision_for(setting)
        problem = decision.reason if decision.kind == "refused" else _refusal_reason(setting, old, new, done)
        if problem:
            refused.append(f"  {setting}: {before!r} -> {after!r} ({problem})")
        elif decision.kind == "recorded":
            recorded.append(Change(setting, before, after, done, _schedule_note(setting, old, new, done)))
    if refused:
        lines = "\n".join(refused)
        raise UserError(
            f"expected the recipe that {run} was started with; got changes that cannot be made to a run:\n{lines}\n"
            f"undo them, or train in another folder (--out) with start={run} to begin from this run's editor"
        )
    return recorded


def _refusal_reason(setting: str, old: Mapping[str, Any], new: Mapping[str, Any], done: int) -> str:
    """The reason why an allowed setting cannot have its new value; "" if it can."""
    keys = setting.split(".")
    if keys[0] != "stages" or len(keys) != 3:
        return ""
    before, after = old["stages"], new["stages"]
    i = int(keys[1])
    if i >= min(len(before), len(after)):
        return "a stage more or less is another training"
    if keys[2] == "updates":
        if i + 1 < len(before):
            return "only the last stage can be extended"
        made = done - sum(stage["updates"] for stage in before[:-1])
        return f"{made} updates of this stage are done" if after[i]["updates"] < made else ""
    products = [stage[i]["batch_size"] * stage[i]["accumulate"] for stage in (before, after)]
    return "" if products[0] == products[1] else f"batch_size x accumulate: {products[0]} -> {products[1]}"


def _schedule_note(setting: str, old: Mapping[str, Any], new: Mapping[str, Any], done: int) -> str:
    """The shape of the learning rate's schedule after a stage's length has changed."""
    if not setting.endswith(".updates"):
        return ""
    i = int(setting.split(".")[1])
    made = max(0, done - sum(stage["updates"] for stage in old["stages"][:i]))
    shares = [
        0.5 * (1 + math.cos(math.pi * min(1.0, made / stages[i]["updates"])))
        for stages in (old["stages"], new["stages"])
    ]
    roles = {r: v["decay"] for r, v in new["stages"][i]["settings"].items() if isinstance(v, Mapping) and "decay" in v}
    notes = [
        f"{role}: cosine to zero at update {new['stages'][i]['updates']}, so the rate goes from {shares[0]:.3f} to "
        f"{shares[1]:.3f} of lr here"
        if decay == "cosine"
        else f"{role}: {decay} rate as before"
        for role, decay in roles.items()
    ]
    return "; ".join(notes)


def data_change(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> tuple[str, bool]:
    """What has happened to training data whose fingerprint changed, in words, and whether the run may resume. It may if
    photos are missing or have come back, and nothing else has changed. Arguments are a source's `inventory()`, None
    where it has none."""
    if not old or not new:
        return "the data source's content or settings", False
    if old["metadata"] != new["metadata"]:
        return "the metadata file has changed", False
    if old.get("held_out", []) != new.get("held_out", []):
        return "the file of held-out rows has changed", False
    before, after = old.get("photos"), new.get("photos")
    if "packed_sizes" in old and "packed_sizes" in new:
        before, after = _unpack_differences(old["packed_sizes"], new["packed_sizes"])
    if before is None or after is None:
        return "the data source's content or settings", False
    changed = [name for name in after if before.get(name) != after[name]]
    lost = [name for name in changed if after[name] < 0]
    back = [name for name in changed if before.get(name, -1) < 0]
    other = [name for name in changed if name not in lost and name not in back]
    groups = (("missing or unreadable", lost), ("back again", back), ("of another size in bytes", other))
    words = "; ".join(f"{what}: {_shorten_list(names)}" for what, names in groups if names)
    return words or "the data source's settings", bool(changed) and not other


def _unpack_differences(old: str, new: str) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes in bytes, by row, of the photos whose sizes differ between two inventories of a large set."""
    before, after = (np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8") for text in (old, new))
    if len(before) != len(after):
        return {}, {}
    numbers = np.flatnonzero(before != after).tolist()
    return {f"row {n + 1}": int(before[n]) for n in numbers}, {f"row {n + 1}": int(after[n]) for n in numbers}


def _shorten_list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def decisions_table() -> str:
    """The decisions as a table in Markdown."""
    lines = ["| setting | a change is | because |", "| --- | --- | --- |"]
    rows = [f"| `{d.pattern}` | {d.kind} | {d.reason} |" for d in DECISIONS]
    rows.append("| number of processes | recorded | sums change by rounding |")
    return "\n".join([*lines, *rows]) + "\n"
