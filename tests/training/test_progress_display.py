"""What a training prints where standard output is no terminal: plain lines, neither wrapped nor cut."""

import io
import re

import yaml
from command_line import start
from rich.console import Console

from npedit.training.progress_display import ProgressDisplay

FIGURES = "  ".join(f"loss_{name} 0.123" for name in "abcdefghij")  # wider than 80 columns
RECIPE = {
    "name": "short",
    "family": {"name": "flux"},
    "data": {"name": "toy"},
    "stages": [{"step": "reference_copy", "updates": 3, "batch_size": 2, "settings": {"steps": 2}}],
    "trainer": {"sample_items": 1, "steps": 2},
}


def shown_lines(seconds, total=100):
    """The lines of a display whose updates come every `seconds`."""
    now, file = 0.0, io.StringIO()
    console = Console(file=file, width=80, soft_wrap=True, highlight=False, markup=False)
    with ProgressDisplay(console, "run", total, clock=lambda: now) as display:
        for done in range(1, total + 1):
            now += seconds
            display.update(done, "np_edit [x]", FIGURES)
    return file.getvalue().split("\n")


def test_a_log_file_gets_one_plain_line_an_interval():
    lines = shown_lines(seconds=2.5)
    assert [int(re.match(r"np_edit \[x\] (\d+)/100  ", line)[1]) for line in lines[:-1]] == [*range(1, 100, 8), 100]
    assert lines[0] == f"np_edit [x] 1/100  {FIGURES}"  # the time of an update is not known yet
    assert lines[1] == f"np_edit [x] 9/100  2.50 s/update  0:03:48 left  {FIGURES}"
    assert lines[-2:] == [f"np_edit [x] 100/100  2.50 s/update  {FIGURES}", ""]
    assert len(shown_lines(seconds=60, total=5)) == 5 + 1  # slow updates have a line each


def test_train_prints_plain_lines_through_a_pipe(tmp_path):
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(RECIPE))
    folder = tmp_path / "a folder whose name is long enough to be wrapped at eighty columns [with brackets]"
    process = start("train", tmp_path / "short.yaml", "--out", folder)
    said = process.communicate(timeout=300)[0].decode("ascii")  # no ellipsis, no bar
    assert process.returncode == 0, said
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)
    lines = said.splitlines()
    updates = [line for line in lines if re.match(r"\w+ \d/3  ", line)]
    assert len(updates) == 2 and re.fullmatch(r"reference_copy 1/3  copy \d\.\d{3}(  .*)?", updates[0])
    assert re.fullmatch(r"reference_copy 3/3  \d+\.\d\d s/update  copy \d\.\d{3}(  .*)?", updates[1])
    assert f"  report   {folder}/report.html" in lines and lines[-1].startswith("  ") and str(folder) in lines[-1]
