"""Edited pictures, answers and folders that a second `npedit evaluate` finds: what is reused, redone or refused."""

from __future__ import annotations

import atexit
import json
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from npedit.benchmarks import _outputs
from npedit.benchmarks import dreambench as dreambench_benchmark
from npedit.benchmarks._outputs import EditJob, edit_missing_pictures, hash_editor, save_png
from npedit.cli import main as cli
from npedit.judges.cache import answer_cache_key, hash_json
from npedit.recipe import config
from npedit.runs.lock import hold
from tests.support.encoder_sets import clip, dino
from tests.support.judge_server import encode_png, picture, send, serving

BENCHMARKS = ("gedit", "imgedit", "own", "dreambench")
JUDGED = ("gedit", "imgedit")
ANSWERS = {"gedit": '{"score": [7, 8]}', "imgedit": '{"score": [3, 4, 5]}'}
PROMPTS_FILE = """Classes

subject_name,class
can,can

Prompts

Object Prompts

prompt_list = [
'a {{0}} {{1}} {place}'.format(unique_token, class_token),
'a {{0}} {{1}} on a table'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {{0}} {{1}} in a hat'.format(unique_token, class_token)
]
"""


def write_data(name: str, folder: Path, prompt: str = "paint it red", seed: int = 0) -> Path:
    """Two items of a benchmark in the form of its own files. The first one has this prompt, and the source picture of
    this seed."""
    folder.mkdir(exist_ok=True)
    first, second = picture(seed, (32, 32)), picture(100, (32, 32))
    if name == "gedit":
        row = {"instruction_language": "en", "Intersection_exist": True}
        tasks = (("color_alter", prompt, first), ("ps_human", "remove it", second))
        rows = [
            {**row, "task_type": t, "key": "0a1b", "instruction": p, "input_image": {"bytes": encode_png(im)}}
            for t, p, im in tasks
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    elif name == "imgedit":
        kinds = {"1": ("a.png", prompt, "add"), "2": ("b.png", "remove it", "remove")}
        entries = {key: dict(zip(("id", "prompt", "edit_type"), values)) for key, values in kinds.items()}
        (folder / "singleturn.json").write_text(json.dumps(entries))
        first.save(folder / "a.png"), second.save(folder / "b.png")
    elif name == "own":
        rows = [{"file_name": "a.png", "instruction": prompt}, {"file_name": "b.png", "instruction": "remove it"}]
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        first.save(folder / "a.png"), second.save(folder / "b.png")
    else:
        (folder / dreambench_benchmark.PROMPTS).write_text(PROMPTS_FILE.format(place=prompt))
        (folder / "can").mkdir(exist_ok=True)
        first.save(folder / "can" / "00.png"), second.save(folder / "can" / "02.png")
    return folder


def invoke(name: str, here: Path, out: Path, *words: object, url: str = "") -> Result:
    """What the command on the data in `here` gives."""
    data = ("--data", here / "data") if name in JUDGED else (here / "data",)
    judge = ("--judge", url, "--judge-model", "m", "--workers", 1) if name in JUDGED else ()
    pictures = ("--pictures", 1) if name == "dreambench" else ()
    command = ("evaluate", name, *data, *judge, *pictures, *encoders(name), "--out", out, *words)
    done = CliRunner().invoke(cli.app, [str(word) for word in command], env={"COLUMNS": "240"})
    assert "Traceback" not in done.output and done.exit_code in (0, 2), (done.output, done.exception)
    return done


def call(*arguments: object, **more: str) -> tuple[int, str]:
    """The exit code and the output of the command."""
    done = invoke(*arguments, **more)
    return done.exit_code, " ".join(done.output.split())


def evaluate(*arguments: object, code: int = 0, **more: str) -> str:
    """The output of a command that ends with this exit code."""
    found, said = call(*arguments, **more)
    assert found == code, said
    return said


@cache
def tiny_encoders() -> tuple[str, ...]:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return "--dino", dino(folder / "dino"), "--clip", clip(folder / "clip")


def encoders(name: str) -> tuple[str, ...]:
    """DreamBench measures nothing without encoders; the others are faster without."""
    return tiny_encoders() if name == "dreambench" else ("--dino", "none", "--clip", "none")


def edited_pictures(out: Path) -> dict[str, np.ndarray]:
    """Path in the folder of results -> pixels, of the edited pictures."""
    files = [p for p in out.rglob("*.png") if not p.name.endswith("_SRCIMG.png")]
    return {p.relative_to(out).as_posix(): np.asarray(Image.open(p), dtype=int) for p in files}


def is_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether the pictures are equal, up to the rounding of a batch of another size."""
    return set(a) == set(b) and all(abs(a[name] - b[name]).max() <= 1 for name in a)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, without a proxy before the judge's server."""
    monkeypatch.setenv("NPEDIT_DEVICE", "cpu")
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path


# ------------------------------------------------------------------------------------------------- edited pictures


def change_weights(editor: Path) -> None:
    """Other weights in files of the same size."""
    path = editor / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: -value for name, value in load_file(path).items()}, path)


CHANGES = {
    "prompt": lambda name, here: write_data(name, here / "data", prompt="paint it blue"),
    "source pixels": lambda name, here: write_data(name, here / "data", seed=1),
    "editor weights": lambda name, here: change_weights(here / "editor"),
    "steps": ("--steps", 2),
    "seed": ("--seed", 1),
}


@pytest.fixture(scope="module")
def evaluated(request, tmp_path_factory):
    """A benchmark's name, and a folder with its data, an editor and the results of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPEDIT_DEVICE", "cpu")
        patch.setenv("NO_PROXY", "*")
        folder = tmp_path_factory.mktemp(request.param)
        write_data(request.param, folder / "data")
        shutil.copytree(config.embedded_weights("editor"), folder / "editor")
        with serving(lambda *_: ANSWERS[request.param]) as server:
            evaluate(request.param, folder, folder / "r", "--model", folder / "editor", "--steps", 1, url=server.url)
        assert len(edited_pictures(folder / "r")) == 2
        return request.param, folder


def is_slow(name: str, change: str) -> bool:
    """gedit and imgedit share the code that compares editors, and so do own and dreambench."""
    return name in ("imgedit", "dreambench") and change in ("editor weights", "steps", "seed")


CASES = [
    pytest.param(name, change, marks=[pytest.mark.slow] if is_slow(name, change) else [])
    for name in BENCHMARKS
    for change in CHANGES
]


@pytest.mark.parametrize(("evaluated", "change"), CASES, indirect=["evaluated"])
def test_pictures_are_not_reused_after_a_change(evaluated, change, here):
    """Either the folder is refused, or its pictures are those that a new folder gets."""
    name, before = evaluated
    for part in ("data", "editor", "r"):
        shutil.copytree(before / part, here / part)
    options = {"--model": before / "editor", "--steps": 1, "--seed": 0}
    options["--model"] = here / "editor" if change == "editor weights" else before / "editor"
    if callable(CHANGES[change]):
        CHANGES[change](name, here)
    else:
        options |= dict([CHANGES[change]])
    words = [word for pair in options.items() for word in pair]
    with serving(lambda *_: ANSWERS[name]) as server:
        evaluate(name, here, here / "new", *words, url=server.url)
        expected, old = edited_pictures(here / "new"), edited_pictures(here / "r")
        assert set(old) == set(expected) and not is_same(old, expected)  # the change makes a difference
        code, said = call(name, here, here / "r", *words, url=server.url)
    found = edited_pictures(here / "r")
    assert is_same(found, expected) if code == 0 else is_same(found, old) and "choose another" in said, said


@pytest.mark.parametrize("version", [1, 2, 3])
def test_pictures_of_another_noise_are_made_anew(version, here, monkeypatch):
    """Version 1 is the noise of pictures whose keys name no version."""
    picture(0, (32, 32)).save(here / "a.png")
    job, edited = EditJob("out.png", here / "a.png", "paint it red", seed=3), []

    def edit(pictures, instructions, seed):
        edited.append(seed)
        return list(pictures)

    monkeypatch.setattr(_outputs, "NOISE_VERSION", 2)
    edit_missing_pictures([job], edit, here, lambda *_: None, editor={"files": "abc"})
    if version == 1:
        facts = {"files": "abc", "seed": 3, "longest": 0}
        source = answer_cache_key([Image.open(here / "a.png").convert("RGB")])
        key = hash_json({"source": source, "instruction": "paint it red", "editor": facts})
        save_png(picture(1, (32, 32)), here / "out.png", key)
    monkeypatch.setattr(_outputs, "NOISE_VERSION", max(2, version))
    edit_missing_pictures([job], edit, here, lambda *_: None, editor={"files": "abc"})
    assert edited == ([3] if version == 2 else [3, 3])


def test_the_hash_of_an_editor_covers_its_local_base_model(tmp_path):
    editor, base = tmp_path / "editor", tmp_path / "base"
    shutil.copytree(config.embedded_weights("editor"), editor)
    assert hash_editor(str(editor)) == hash_editor("embedded")  # as in results of earlier versions
    base.mkdir()
    (base / "weights").write_text("1")
    facts = json.loads((editor / "npedit.json").read_text())
    (editor / "npedit.json").write_text(json.dumps({**facts, "base": str(base)}))
    before = hash_editor(str(editor))
    (base / "weights").write_text("2")
    assert hash_editor(str(editor)) != before


# ---------------------------------------------------------------------------------------------------- interrupted runs


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


COPY = {"gedit": ("--model", "copy"), "imgedit": ("--model", "copy"), "own": ("--copy",), "dreambench": ("--copy",)}


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_same_command_resumes_after_a_full_disk(name, here):
    """The limit rises from run to run, so that each time another file is the first that does not fit."""
    write_data(name, here / "data")
    with serving(lambda *_: ANSWERS[name]) as server:
        evaluate(name, here, here / "clean", *COPY[name], url=server.url)
        too_large = set()
        for size in (0, 60, 300, 800, 1200, 1700, 2500, 3200, 100_000):
            with file_size_limit(size):
                code, said = call(name, here, here / "r", *COPY[name], url=server.url)
            if code == 0:
                break
            too_large.add(re.search(r"room on the disk for (\S+?);", said)[1])
    assert code == 0 and len(too_large) >= 2, too_large
    assert rows_of(here / "r") == rows_of(here / "clean")
    assert is_same(edited_pictures(here / "r"), edited_pictures(here / "clean"))


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("damage", ["last line cut", "line in the middle"])
def test_a_damaged_answer_is_asked_for_again_and_the_others_are_kept(name, damage, here, caplog):
    write_data(name, here / "data")
    with serving(lambda *_: ANSWERS[name]) as server:
        evaluate(name, here, here / "r", *COPY[name], url=server.url)
        rows, asked = rows_of(here / "r"), len(server.bodies)
        answers = here / "r" / "answers.jsonl"
        lines = answers.read_bytes().splitlines()
        if damage == "last line cut":
            answers.write_bytes(answers.read_bytes()[:-40])
        else:
            answers.write_bytes(b"\n".join([lines[0][:50], *lines[1:], b""]))
        said = evaluate(name, here, here / "r", *COPY[name], url=server.url)
    assert len(server.bodies) == asked + 1 and rows_of(here / "r") == rows
    assert f"1 answers came from m; {asked - 1} were there already" in said
    assert ("1 damaged lines" in caplog.text) == (damage == "line in the middle")


@pytest.mark.parametrize("name", JUDGED)
def test_a_run_resumes_at_another_address_and_the_settings_count_the_answers_of_each(name, here):
    write_data(name, here / "data")

    def fail_after_one(number, _):
        return ANSWERS[name] if number < 1 else lambda handler: send(handler, 401, b"{}")

    with serving(fail_after_one) as first:
        assert "HTTP 401" in evaluate(name, here, here / "r", *COPY[name], url=first.url, code=2)
    with serving(lambda *_: ANSWERS[name]) as second:
        evaluate(name, here, here / "r", *COPY[name], url=second.url)
    facts = json.loads((here / "r" / "settings.json").read_text())
    total = 4 if name == "gedit" else 2
    assert facts["addresses"] == {first.url: 1, second.url: total - 1} and len(second.bodies) == total - 1
    assert "127.0.0.1" not in json.dumps(facts["judge"])


@pytest.mark.parametrize("name", JUDGED)
def test_fresh_does_not_move_a_folder_that_another_process_holds(name, here):
    write_data(name, here / "data")
    with hold(here / "r", "evaluate"), serving(lambda *_: ANSWERS[name]) as server:
        said = evaluate(name, here, here / "r", *COPY[name], "--fresh", url=server.url, code=2)
        assert not server.bodies
    assert "to be free; got a folder that is held by process" in said
    assert sorted(p.name for p in here.iterdir()) == ["data", "r"]


# ---------------------------------------------------------------------------------------- pictures of another editor


EDITED_NAMES = {  # of the two items
    "gedit": ("fullset/color_alter/en/0a1b.png", "fullset/ps_human/en/0a1b.png"),
    "imgedit": ("1.png", "2.png"),
    "own": ("000001.png", "000002.png"),  # of rows without an id
    "dreambench": ("can/00-0.png", "can/01-0.png"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_row_without_an_edited_picture_has_its_reason_on_screen_and_in_the_results(name, here):
    """One picture is there as JPEG, the other one is missing."""
    write_data(name, here / "data")
    there, missing = (here / "theirs" / file for file in EDITED_NAMES[name])
    there.parent.mkdir(parents=True)
    picture(5, (32, 32)).save(there.with_suffix(".jpg"))
    with serving(lambda *_: ANSWERS[name]) as server:
        said = evaluate(name, here, here / "r", "--edited", here / "theirs", url=server.url)
    found, lost = rows_of(here / "r")
    reason = f"no edited picture {missing.name}: no such file"
    assert f"scores are missing in 1 of 2 rows; {lost['id']}: {reason}" in said
    if name in JUDGED:
        assert lost["reason"] == reason and set(lost["why"].values()) == {"missing_image"}
        assert "reason" not in found and None not in found["scores"].values()
        lost = rows_of(here / "r" / "preservation")[1]
    assert reason in lost["why"].values()
    assert all(value is None for key, value in lost["scores"].items() if not key.startswith("copy/"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_any_edited_picture_both_rows_are_named(name, here):
    write_data(name, here / "data")
    (here / "theirs").mkdir()
    with serving(lambda *_: ANSWERS[name]) as server:
        said = evaluate(name, here, here / "r", "--edited", here / "theirs", url=server.url, code=2)
    for file in EDITED_NAMES[name]:
        assert f"no edited picture {Path(file).name}: no such file" in said
    assert "scores are missing in 2 of 2 rows" in said and "got none" in said
    assert {row["id"] for row in rows_of(here / "r")} == set(re.findall(r"(\S+): no edited picture", said))


# --------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", BENCHMARKS)
def test_json_is_the_summary_and_alone_on_standard_output(name, here):
    write_data(name, here / "data")
    copies = ("--model", "copy") if name in JUDGED else ("--copy",)
    with serving(lambda *_: ANSWERS[name]) as server:
        done = invoke(name, here, here / "r", *copies, "--json", url=server.url)
    found = json.loads(done.stdout)
    assert found["benchmark"] == name and found["folder"] == str(here / "r") and found["items"] == 2
    assert found["scores"] == json.loads((here / "r" / "summary.json").read_text())
    assert str(here / "r") in done.stderr
    if name in JUDGED:
        assert found["preservation"] == json.loads((here / "r" / "preservation" / "summary.json").read_text())
    assert ("preservation" in found) == (name in JUDGED)
