"""LPIPS: the authors' own numbers, what must hold of any distance, and its place among the metrics."""

import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from npedit.cli import main as cli
from npedit.scoring.encoders import MissingEncoder
from npedit.scoring.lpips import CHANNELS, HEADS, MIN_SIDE, TRUNK, Lpips, alexnet_features
from npedit.scoring.metrics import as_tensor, metrics_outside_mask, perceptual_metrics
from npedit.scoring.results import UndefinedMetric
from npedit.toy.dataset import write_dataset

CPU = torch.device("cpu")


def filled(shape, k):
    """Weights that are the same on every machine."""
    count = math.prod(shape)
    wave = torch.sin(torch.arange(count, dtype=torch.float64) * (1 + k / 7) + k)
    return (wave.view(shape) / (count / shape[0]) ** 0.5 * 2).float()


def weights():
    net = alexnet_features()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(filled(p.shape, k))
    return net, [filled((1, c, 1, 1), 20 + i).abs() for i, c in enumerate(CHANNELS)]


@pytest.fixture(scope="module")
def lpips():
    return Lpips(*weights(), CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The two files as they are downloaded: torchvision's whole AlexNet, and the authors' heads."""
    folder = tmp_path_factory.mktemp("lpips")
    net, heads = weights()
    trunk = {f"features.{k}": v for k, v in net.state_dict().items()}
    torch.save(trunk | {"classifier.1.weight": torch.zeros(2, 2)}, folder / TRUNK)
    torch.save({f"lin{i}.model.1.weight": h for i, h in enumerate(heads)}, folder / HEADS)
    return folder


def pictures():
    at = torch.arange(3 * 40 * 56, dtype=torch.float64)
    return tuple((0.5 + 0.5 * torch.sin(at * 0.7 + more)).view(3, 40, 56).float() for more in (0, at / 900))


def test_lpips_equals_the_authors_package(lpips):
    """lpips 0.1.4 (`LPIPS(net="alex")`, plain and spatial, normalize=True) on these weights and pictures."""
    a, b = pictures()
    assert lpips.distance(a, b) == pytest.approx(0.04275138, rel=1e-5)
    found = lpips.distance_map(a, b)
    assert found.shape == (40, 56)
    assert float(found.mean()) == pytest.approx(0.04259979, rel=1e-5)
    assert float(found.max()) == pytest.approx(0.26537278, rel=1e-5)
    assert float(found[-1, 3]) == pytest.approx(0.09759864, rel=1e-5)


def test_lpips_is_zero_for_equal_pictures_and_symmetric(lpips):
    a, b = pictures()
    assert lpips.distance(a, a) == 0 and float(lpips.distance_map(b, b).max()) == 0
    assert lpips.distance(a, b) == pytest.approx(lpips.distance(b, a))
    nearer, farther = (lpips.distance(a, torch.lerp(a, b, share)) for share in (0.1, 0.5))
    assert 0 < nearer < farther


def test_lpips_has_a_smallest_picture_size(lpips):
    assert lpips.distance(torch.zeros(3, MIN_SIDE, MIN_SIDE), torch.ones(3, MIN_SIDE, MIN_SIDE)) > 0
    with pytest.raises(ValueError, match="31 pixels"):
        lpips.distance(torch.zeros(3, MIN_SIDE - 1, 64), torch.ones(3, MIN_SIDE - 1, 64))
    with pytest.raises(RuntimeError):  # the bound is the net's own
        alexnet_features()(torch.zeros(1, 3, MIN_SIDE - 1, 64))


def test_lpips_weight_files_open_as_downloaded(lpips, folder):
    assert Lpips.load(folder, CPU).distance(*pictures()) == lpips.distance(*pictures())


def test_lpips_outside_a_mask_is_the_mean_over_these_pixels(lpips):
    a, b = (Image.fromarray((p.permute(1, 2, 0) * 255).byte().numpy()) for p in pictures())
    mask = Image.new("L", a.size)
    mask.paste(255, (0, 0, 20, 40))
    gone = MissingEncoder("x", "not here")
    found = metrics_outside_mask(lambda: a, lambda: b, lambda: mask, gone, gone, lpips)
    expected = lpips.distance_map(as_tensor(a), as_tensor(b))[:, 20:].mean()
    assert found["lpips_alex_outside"]() == pytest.approx(float(expected))
    small = a.crop((0, 0, 30, 40))
    with pytest.raises(UndefinedMetric, match="31 x 31"):
        perceptual_metrics(lambda: small, lambda: small, lpips)["lpips_alex"]()


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(w) for w in words], env={"COLUMNS": "240"})


def test_evaluate_own_computes_lpips(folder, tmp_path):
    data = write_dataset(tmp_path / "data", 4, 0, pairs=True)
    rest = ("--dino", "none", "--clip", "none", "--lpips", folder)
    for name, words in (("copy", ["--copy"]), ("editor", ["--steps", 1])):
        done = invoke("evaluate", "own", data, "--out", tmp_path / name, *words, *rest)
        assert done.exit_code == 0, done.output
    copy, editor = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("copy", "editor"))
    assert copy["lpips_alex"]["value"] == 0 < editor["lpips_alex"]["value"]
    assert copy["lpips_alex_target"]["value"] > 0 and editor["lpips_alex"]["n"] == 4
    plot = ["--plot", tmp_path / "c.png"]
    done = invoke("compare", tmp_path / "copy", tmp_path / "editor", "--metric", "lpips_alex", *plot)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("fault", ["none", "cut", "shape", "keys"])
def test_bad_files_are_refused(folder, tmp_path, fault):
    for name in (TRUNK, HEADS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    if fault == "none":
        (tmp_path / HEADS).unlink()
    elif fault == "cut":
        (tmp_path / TRUNK).write_bytes((folder / TRUNK).read_bytes()[:1000])
    elif fault == "shape":
        torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / TRUNK)
    else:
        torch.save({"lin0": torch.zeros(1)}, tmp_path / HEADS)
    data = write_dataset(tmp_path / "data", 2, 0)
    done = invoke("evaluate", "own", data, "--out", tmp_path / "r", "--copy", "--lpips", tmp_path)
    assert done.exit_code == 2 and "LPIPS' weights" in done.output and "Traceback" not in done.output
    assert not (tmp_path / "r").exists()
