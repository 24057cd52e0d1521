"""Measures without a judge: scikit-image, brute force, identities, and what is undefined."""

import math

import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch
from PIL import Image

from npedit.scoring import metrics as m
from npedit.scoring.encoders import MissingEncoder
from npedit.scoring.results import MissingScore, Row, UndefinedMetric

GONE = MissingEncoder("vits16", "not here")


@pytest.fixture(scope="module")
def pictures():
    """A photograph and a noisy, darker one, (3, 48, 80)."""
    photo = Image.fromarray(skimage.data.astronaut()).crop((150, 0, 310, 96)).resize((80, 48))
    noise = np.random.default_rng(0).normal(0, 12, (48, 80, 3))
    other = Image.fromarray((np.asarray(photo) * 0.9 + noise).clip(0, 255).astype(np.uint8))
    return photo, other


def both(pictures):
    a, b = (m.as_tensor(p) for p in pictures)
    return a, b, torch.ones(a.shape[1:], dtype=torch.bool)


def mask():
    """White, the edit, in the left 30 columns of 80 x 48."""
    pixels = np.zeros((48, 80), dtype=np.uint8)
    pixels[:, :30] = 255
    return Image.fromarray(pixels)


def test_psnr_and_ssim_equal_scikit_image(pictures):
    a, b, kept = both(pictures)
    x, y = (np.asarray(t.permute(1, 2, 0), dtype=np.float64) for t in (a, b))
    assert m.psnr(a, b, kept) == pytest.approx(skimage.metrics.peak_signal_noise_ratio(x, y, data_range=1), abs=1e-9)
    assert m.l2(a, b, kept) == pytest.approx(skimage.metrics.mean_squared_error(x, y), abs=1e-12)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = skimage.metrics.structural_similarity(x, y, data_range=1, channel_axis=2, **options)
    assert m.ssim(a, b, kept) == pytest.approx(expected, abs=1e-9)
    assert 0.2 < m.ssim(a, b, kept) < 0.95


def test_values_by_hand():
    a, b = torch.zeros(3, 12, 12), torch.full((3, 12, 12), 0.5)
    kept = torch.ones(12, 12, dtype=torch.bool)
    assert m.l1(a, b, kept) == 0.5 and m.l2(a, b, kept) == 0.25
    assert m.psnr(a, b, kept) == pytest.approx(6.0206, abs=1e-4)
    c1 = 0.01**2  # without variance only the means count
    assert m.ssim(a, b, kept) == pytest.approx(c1 / (0.25 + c1), rel=1e-6)
    assert m.changed_area(a, b, kept) == 1 and m.is_copy(a, b, kept) == 0


def test_equal_pictures(pictures):
    a, _, kept = both(pictures)
    assert m.l1(a, a, kept) == m.l2(a, a, kept) == m.changed_area(a, a, kept) == 0
    assert m.ssim(a, a, kept) == pytest.approx(1, abs=1e-12) and m.is_copy(a, a, kept) == 1
    with pytest.raises(UndefinedMetric, match="undefined: the pictures are equal"):
        m.psnr(a, a, kept)


def test_metrics_outside_a_mask_equal_a_loop_over_these_pixels(pictures):
    a, b, kept = both(pictures)
    kept[:, :30] = False
    assert m.l1(a, b, kept) == pytest.approx(float((a - b).abs()[:, :, 30:].mean()), abs=1e-6)
    assert m.l2(a, b, kept) == pytest.approx(float((a - b).double().square()[:, :, 30:].mean()), abs=1e-9)
    assert m.psnr(a, b, kept) == pytest.approx(-10 * math.log10(m.l2(a, b, kept)))
    whole = torch.ones(48, 50, dtype=torch.bool)
    assert m.ssim(a, b, kept) == pytest.approx(m.ssim(a[:, :, 30:], b[:, :, 30:], whole), abs=1e-9)


def test_what_happens_inside_a_mask_does_not_count(pictures):
    photo, _ = pictures
    painted = Image.composite(Image.new("RGB", photo.size, "magenta"), photo, mask())
    found = Row.from_metrics("i", "t", m.metrics_outside_mask(lambda: photo, lambda: painted, mask, GONE, GONE))
    assert found.scores["l1_outside"] == 0 and found.scores["ssim_outside"] == pytest.approx(1)
    assert found.scores["psnr_outside"] is None and found.why["psnr_outside"].startswith("undefined: ")
    assert found.scores["dino_vits16_outside"] is None and found.why["dino_vits16_outside"] == "not here"
    spilt = painted.copy()
    spilt.putpixel((40, 20), (255, 0, 255))
    found = Row.from_metrics("i", "t", m.metrics_outside_mask(lambda: photo, lambda: spilt, mask, GONE, GONE))
    assert 0 < found.scores["l1_outside"] < 0.001 and found.scores["psnr_outside"] > 20


def test_metrics_are_undefined_if_the_mask_covers_everything(pictures):
    a, b, kept = both(pictures)
    for measure in (m.l1, m.l2, m.psnr, m.ssim):
        with pytest.raises(UndefinedMetric, match="nothing is left outside"):
            measure(a, b, ~kept)
    kept[:, ::5] = False  # lines everywhere: no whole window is outside
    assert m.l1(a, b, kept) > 0
    with pytest.raises(UndefinedMetric, match="nothing is left outside"):
        m.ssim(a, b, kept)
    with pytest.raises(UndefinedMetric, match="11 x 11"):
        m.ssim(a[:, :8], b[:, :8], kept[:8])


def test_vae_noise_counts_as_a_copy_and_a_small_edit_does_not(pictures):
    photo, _ = pictures
    edited = photo.copy()
    edited.paste((250, 20, 20), (10, 10, 22, 20))
    kept = torch.ones(48, 80, dtype=torch.bool)
    a, c = (m.as_tensor(p) for p in (photo, edited))
    assert m.changed_area(a, c, kept) == pytest.approx(12 * 10 / (80 * 48))
    large, other = torch.zeros(3, 512, 600), torch.zeros(3, 512, 600)
    other[:, 100:112, 100:110] = 0.5  # of 5 x 5 pixels at 512 more than a fifth must be in it: the corners are rounded
    share = m.changed_area(large, other, torch.ones(512, 600, dtype=torch.bool))
    assert 12 * 10 < share * 512 * 600 <= 16 * 14
    assert m.is_copy(a, c, kept) == 0
    slight = (a + 0.02 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert m.is_copy(a, slight, kept) == 1


def test_another_size_is_scaled_and_another_shape_refused(pictures):
    photo, _ = pictures
    larger = photo.resize((160, 96), Image.Resampling.BICUBIC)
    found = Row.from_metrics("i", "t", m.pixel_metrics(lambda: photo, lambda: larger))
    assert found.scores["psnr"] > 30 and found.scores["ssim"] > 0.95
    found = Row.from_metrics("i", "t", m.pixel_metrics(lambda: photo, lambda: photo.resize((80, 80))))
    assert set(found.scores.values()) == {None} and found.why["l1"] == "expected the reference's shape 80x48; got 80x80"


def test_a_missing_picture_is_the_reason_for_every_missing_metric(pictures):
    def broken():
        raise MissingScore("no edited picture x.png: no such file")

    metrics = m.pixel_metrics(lambda: pictures[0], broken) | m.feature_metrics(broken, broken, GONE, GONE)
    found = Row.from_metrics("i", "t", metrics)
    assert len(found.scores) == 8 and set(found.scores.values()) == {None}
    assert found.why["copied"] == "no edited picture x.png: no such file"


def test_directions():
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [-2.0, 2.0]])
    assert m.directional_similarity(images, texts) == pytest.approx(1)
    assert m.directional_similarity(images.flip(0), texts) == pytest.approx(-1)
    for same in ((images[[0, 0]], texts), (images, texts[[1, 1]])):
        with pytest.raises(UndefinedMetric, match="is unchanged"):
            m.directional_similarity(*same)
