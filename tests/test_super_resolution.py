"""Super-resolution: MATLAB's resizing, the measures of the literature, pairs that fit together."""

import functools
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from disco_jax.data import photos, sources
from disco_jax.data.images import SPLITS
from disco_jax.data.imresize import imresize
from disco_jax.errors import DiscoError
from disco_jax.tasks.super_resolution import SuperResolution, luma, psnr, self_ensemble, ssim

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TASK = SuperResolution(2, MEAN, STD)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def normalised(images):
    return jnp.asarray((images / 255 - np.array(MEAN)) / np.array(STD), jnp.float32)


def formula(size, new_size, scale):
    """The matrix of weights in fractions, summed over all places of the mirrored image."""

    def kernel(x):
        if x <= 1:
            return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
        return Fraction(-1, 2) * x**3 + Fraction(5, 2) * x**2 - 4 * x + 2 if x <= 2 else Fraction(0)

    matrix = []
    for j in range(new_size):
        centre, row = (j + Fraction(1, 2)) / scale - Fraction(1, 2), [Fraction(0)] * size
        for tile in range(-12, 13):  # ..., mirrored, the image, mirrored, ...
            for i in range(size):
                place = tile * size + (size - 1 - i if tile % 2 else i)
                row[i] += kernel(min(scale, Fraction(1)) * abs(centre - place))
        matrix.append([weight / sum(row) for weight in row])
    return np.array(matrix)


@pytest.mark.parametrize("scale", ["1/2", "1/3", "1/4", "2/5", "1", "3/2", "2", "3"])
@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_impulse_responses_are_the_formula(size, scale):
    scale = Fraction(scale)
    expected = formula(size, -(-size * scale // 1), scale)
    impulses = np.eye(size)[:, None, :]  # each in a channel of its own, on one column
    got = imresize(impulses, float(scale))
    np.testing.assert_allclose(got[:, 0], expected.astype(float), atol=1e-14)
    np.testing.assert_allclose(imresize(impulses.swapaxes(0, 1), float(scale))[0], got[:, 0])


def test_weights_by_hand():
    """Halved: (-3 -9 29 111 111 29 -9 -3) / 256, of which the border folds back three."""
    got = imresize(np.eye(12)[:, None, :], (6, 1))[:, 0] * 256
    np.testing.assert_array_equal(got[0], [140, 102, 26, -9, -3, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(got[2], [0, -3, -9, 29, 111, 111, 29, -9, -3, 0, 0, 0])
    np.testing.assert_array_equal(got[5], got[0][::-1])


def test_constants_stay_and_ramps_stay_in_the_interior():
    for scale in (0.25, 1 / 3, 0.5, 0.7, 1.5, 4):
        same = imresize(np.full((9, 11, 2), 7.25), scale)
        np.testing.assert_allclose(same, 7.25, rtol=1e-14)
    for factor in (2, 3, 4):
        ramp = imresize(np.arange(60.0)[None, :, None], 1 / factor)[0, :, 0]
        centres = (np.arange(60 // factor) + 0.5) * factor - 0.5
        np.testing.assert_allclose(ramp[2:-2], centres[2:-2], atol=1e-12)


@pytest.mark.parametrize("size", [(6, 5), (7, 5), (6, 10), (24, 7)])
def test_bytes_are_rounded_after_each_axis(size):
    """The axis that shrinks most comes first, rows of equal ones."""
    image = pixels(12, 15, 1)
    scales = [Fraction(new, old) for new, old in zip(size, image.shape[:2], strict=True)]
    rows, columns = (
        formula(old, new, scale)
        for old, new, scale in zip(image.shape[:2], size, scales, strict=True)
    )
    rounded = np.vectorize(lambda x: min(max(int((x + Fraction(1, 2)) // 1), 0), 255))
    exact = image[..., 0].astype(object)
    if scales[0] <= scales[1]:
        expected = rounded(rounded(rows @ exact).astype(object) @ columns.T)
    else:
        expected = rounded(rows @ rounded(exact @ columns.T).astype(object))
    got = imresize(image, size)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got[..., 0], expected)


def test_halves_are_rounded_up_and_overshoots_clipped():
    assert imresize(np.array([[[2]], [[3]]], np.uint8), (1, 1)).item() == 3
    edge = np.repeat(np.array([0, 255], np.uint8), 8)[None, :, None]
    smooth = imresize(edge.astype(np.float64), (1, 24))
    assert smooth.min() < -1
    assert smooth.max() > 256
    expected = np.floor(np.clip(smooth, 0, 255) + 0.5)
    np.testing.assert_array_equal(imresize(edge, (1, 24)), expected)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_interior_is_pillow_s(factor):
    image = np.random.default_rng(0).normal(size=(48, 72, 1)).astype(np.float32)
    got = imresize(image, 1 / factor)
    assert got.dtype == np.float32
    size = (72 // factor, 48 // factor)
    theirs = np.asarray(Image.fromarray(image[..., 0]).resize(size, Image.Resampling.BICUBIC))
    close(got[2:-2, 2:-2, 0], theirs[2:-2, 2:-2], 1e-6)


@pytest.mark.parametrize("size", [(24, 18), (20, 31), (96, 100)])
def test_interior_is_torch_s(size):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).normal(size=(48, 72, 3))
    theirs = torch.nn.functional.interpolate(
        torch.tensor(image).permute(2, 0, 1)[None], size, mode="bicubic", antialias=True
    )[0].permute(1, 2, 0)
    border = 4
    got, theirs = (x[border:-border, border:-border] for x in (imresize(image, size), theirs))
    close(got, theirs.numpy(), 1e-12)


def test_sizes_are_rounded_up_but_the_factor_stays():
    image = np.random.default_rng(0).normal(size=(9, 7, 1))
    got = imresize(image, 0.5)
    assert got.shape == (5, 4, 1)
    rows, columns = (formula(n, -(-n // 2), Fraction(1, 2)).astype(float) for n in (9, 7))
    np.testing.assert_allclose(got[..., 0], rows @ image[..., 0] @ columns.T, atol=1e-14)


@pytest.mark.parametrize(
    ("image", "scale"),
    [
        (np.zeros((4, 4), np.uint8), 0.5),
        (np.zeros((4, 4, 1), np.int64), 0.5),
        (np.zeros((4, 4, 1)), 0.0),
        (np.zeros((4, 4, 1)), (0, 2)),
        (np.zeros((0, 4, 1)), 0.5),
    ],
)
def test_imresize_refuses(image, scale):
    with pytest.raises(DiscoError, match="must be"):
        imresize(image, scale)


def test_luma_is_matlab_s():
    """rgb2ycbcr's first row: 65.481, 128.553, 24.966, and 16."""
    colours = {(255, 255, 255): 235, (0, 0, 0): 16, (255, 0, 0): 81.481, (0, 255, 0): 144.553}
    colours |= {(0, 0, 255): 40.966, (128, 128, 128): 16 + 219 * 128 / 255}
    got = luma(jnp.array(list(colours), jnp.float32)[None])
    np.testing.assert_allclose(got[0], list(colours.values()), atol=2e-5)
    grey = jnp.arange(6.0).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(luma(grey), grey[..., 0])


def planes(seed):
    """Four images, the last without any contrast, and the same with more or less noise."""
    rng = np.random.default_rng(seed)
    smooth = imresize(rng.uniform(0, 255, (8, 10, 3)), (33, 40)).transpose(2, 0, 1)
    clean = np.concatenate([smooth, np.full((1, 33, 40), 200.0)])
    noise = rng.normal(size=clean.shape) * np.array([1, 5, 60, 5])[:, None, None]
    return [np.clip(np.round(x), 0, 255).astype(np.float32) for x in (clean, clean + noise)]


def test_psnr_and_ssim_are_scikit_image_s():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = planes(0)
    theirs = [
        metrics.peak_signal_noise_ratio(*pair, data_range=255) for pair in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(jax.jit(psnr)(a, b), theirs, rtol=1e-5)
    likeness = functools.partial(
        metrics.structural_similarity,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    theirs = [likeness(*(v.astype(np.float64) for v in pair)) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(jax.jit(ssim)(a, b), theirs, atol=2e-5)
    assert min(theirs) < 0.75 < 0.99 < max(theirs)


def test_psnr_and_ssim_by_hand():
    """An error of 1 everywhere: 20 · log10(255); constants: only their light differs."""
    zeros = jnp.zeros((2, 12, 12))
    np.testing.assert_allclose(psnr(zeros, zeros + 1), 20 * np.log10(255), rtol=1e-6)
    np.testing.assert_array_equal(psnr(zeros, zeros), 100)
    c1 = 2.55**2
    expected = (2 * 100 * 50 + c1) / (100**2 + 50**2 + c1)
    np.testing.assert_allclose(jax.jit(ssim)(zeros + 100, zeros + 50), expected, atol=5e-5)
    np.testing.assert_allclose(jax.jit(ssim)(zeros, zeros), 1, rtol=1e-6)
    with pytest.raises(DiscoError, match="at least 11 x 11"):
        ssim(zeros[:, :10], zeros[:, :10])


def test_measures_are_of_eight_bit_luma_without_the_border():
    truth, border = pixels(2, 20, 24, 3), np.ones((20, 24), bool)
    border[2:-2, 2:-2] = False
    noisy = truth.astype(np.float64) + np.random.default_rng(1).normal(0, 60, truth.shape)
    noisy[:, border] = 1e4  # must not matter
    eight_bits = np.clip(np.round(noisy), 0, 255)
    weights = np.array([65.481, 128.553, 24.966]) / 255
    error = ((eight_bits - truth) @ weights)[:, 2:-2, 2:-2]
    expected = 10 * np.log10(255**2 / np.square(error).mean((1, 2)))
    batch = {"target": normalised(truth), "weight": jnp.ones(2)}
    summary = TASK.summary([jax.jit(TASK.measure)(normalised(noisy), batch)])
    np.testing.assert_allclose(summary[TASK.metric], expected.mean(), rtol=1e-5)
    loss = np.abs((noisy - truth) / 255 / np.array(STD)).mean()
    np.testing.assert_allclose(summary["loss"], loss, rtol=1e-5)


def test_fill_does_not_count_and_batches_weigh_by_their_images():
    truth, found = (normalised(pixels(5, 20, 20, 3, seed=seed)) for seed in (0, 1))
    found = found.at[1].set(truth[1] + 0.1)
    measure = jax.jit(TASK.measure)

    def measured(index, weight):
        batch = {"target": truth[jnp.array(index)], "weight": jnp.array(weight)}
        return measure(found[jnp.array(index)], batch)

    parts = [measured([0, 1, 2], [1.0, 1.0, 1.0]), measured([3, 1, 1], [1.0, 0.0, 0.0])]
    single = [measured([i, i, i], [0.0, 1.0, 0.0]) for i in range(4)]
    together, each = TASK.summary(parts), [TASK.summary([one]) for one in single]
    assert set(together) == {"PSNR", "SSIM", "loss"}
    for name, value in together.items():
        np.testing.assert_allclose(value, np.mean([one[name] for one in each]), rtol=1e-5)


def test_loss_and_imitation_are_mean_absolute_errors():
    a, b = (np.random.default_rng(seed).normal(size=(2, 4, 4, 3)) for seed in (0, 1))
    expected = np.abs(a - b).mean()
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    np.testing.assert_allclose(TASK.loss(a, {"target": b}), expected, rtol=1e-6)
    np.testing.assert_allclose(TASK.imitation(a, b, 4.0), expected, rtol=1e-6)
    with pytest.raises(DiscoError, match="same `scale`"):
        TASK.loss(a, {"target": b[:, :2, :2]})  # whose axes of 1 would be stretched silently
    with pytest.raises(DiscoError, match="same `scale`"):
        TASK.loss(a, {"target": b[..., :1]})


def test_self_ensemble():
    """Of what commutes with flips and rotations, itself; of anything, something that does."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 3)), jnp.float32)

    def enlarge(x):
        return jnp.repeat(jnp.repeat(jnp.tanh(x), 2, 1), 2, 2)

    close(jax.jit(functools.partial(self_ensemble, enlarge))(images), enlarge(images), 1e-6)

    def lopsided(x):
        return enlarge(x + 0.5 * jnp.roll(x, 1, 1)) * jnp.arange(2 * x.shape[2])[:, None]

    mean = jax.jit(functools.partial(self_ensemble, lopsided))
    assert not np.allclose(mean(images), lopsided(images), atol=0.1)
    for turn in (lambda x: x[:, ::-1], lambda x: x[:, :, ::-1], lambda x: x.swapaxes(1, 2)):
        close(mean(turn(images)), turn(mean(images)), 1e-5)


def test_splits_of_the_samples_share_no_pixel():
    from sklearn.datasets import load_sample_images

    parts = [photos.samples("", split) for split in SPLITS]
    assert [part[1]["target"].shape for part in parts] == [(427, w, 3) for w in (384, 96, 160)]
    for i, whole in enumerate(load_sample_images().images):
        side_by_side = np.concatenate([part[i]["target"] for part in parts], axis=1)
        np.testing.assert_array_equal(side_by_side, whole)


def write(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(pixels(5, 6, 3, seed=i)).save(folder / f"{i:02}.png")


@pytest.mark.parametrize(
    ("folders", "counts"),
    [
        ({"train": 20, "validation": 3, "test": 2}, (20, 3, 2)),
        ({"train": 20, "test": 2}, (18, 2, 2)),
        ({"train": 20, "validation": 3}, (18, 2, 3)),
        ({"train": 20}, (18, 2, None)),
        ({".": 4}, (None, None, 4)),
    ],
)
def test_folders_of_photos(tmp_path, folders, counts):
    for name, count in folders.items():
        write(tmp_path / name, count)
    parts = {}
    for split, count in zip(SPLITS, counts, strict=True):
        if count is None:
            with pytest.raises(DiscoError, match="needs pictures in"):
                photos.photos(str(tmp_path), split)
        else:
            parts[split] = photos.photos(str(tmp_path), split)
            assert len(parts[split]) == count
    paths = [path for part in parts.values() for path in part.paths]
    assert len(paths) == len(set(paths))
    first = parts["test" if "test" in parts else "train"]
    index = int(first.paths[0].stem)
    np.testing.assert_array_equal(first[0]["target"], pixels(5, 6, 3, seed=index))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DiscoError, match="nowhere"):
        photos.photos(str(tmp_path / "nowhere"), "test")


def test_tfds_pairs_without_tensorflow(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"lr": tfds.features.Image(), "hr": tfds.features.Image()}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            folders = {"train": 20, "validation": 3}
            for name, count in folders.items():
                write(tmp_path / name, count)
            return {name: self._generate_examples(tmp_path / name) for name in folders}

        def _generate_examples(self, folder):
            for path in folder.glob("*.png"):
                yield path.name, {"lr": str(path), "hr": str(path)}

    pairs = Pairs(data_dir=str(tmp_path / "made"), file_format="array_record")
    pairs.download_and_prepare()
    monkeypatch.setattr(tfds, "builder", lambda name: pairs)
    parts = [sources.load("tfds_photos:pairs", split) for split in SPLITS]
    assert [len(part) for part in parts] == [18, 2, 3]
    seen = {part[i]["target"].tobytes() for part in parts[:2] for i in range(len(part))}
    assert seen == {pixels(5, 6, 3, seed=i).tobytes() for i in range(20)}
    assert "tensorflow" not in sys.modules


@given(st.integers(8, 30), st.integers(8, 30), st.sampled_from([1, 2, 3, 4]), st.integers(0, 99))
def test_transforms_keep_their_word(height, width, scale, seed):
    """Input untouched, repeatable, patches from the picture, the small image that of its target."""
    transforms, size = photos.make_transforms(scale), 2
    example = {"target": pixels(height, width, 3), "name": "x"}
    before = example["target"].copy()

    def run(*names):
        found, rng = example, np.random.default_rng(seed)
        for name in names:
            found = transforms[name](found, size, rng)
        return found

    names = ("random_patch", "dihedral", "degrade")
    got, again = run(*names), run(*names)
    assert got["name"] == "x"
    assert got["image"].shape == (size, size, 3)
    assert got["target"].shape == (size * scale, size * scale, 3)
    np.testing.assert_array_equal(got["image"], again["image"])
    np.testing.assert_array_equal(got["image"], imresize(got["target"], 1 / scale))
    patch = run("random_patch")["target"]
    windows = np.lib.stride_tricks.sliding_window_view(before, patch.shape)
    assert (windows == patch).all((-3, -2, -1)).any()
    whole = run("degrade")
    assert whole["image"].shape == (height // scale, width // scale, 3)
    kept = before[: height // scale * scale, : width // scale * scale]
    np.testing.assert_array_equal(whole["target"], kept)
    np.testing.assert_array_equal(example["target"], before)
    assert set(example) == {"target", "name"}


def test_dihedral_has_eight_results_alike_often():
    dihedral, rng = photos.make_transforms(2)["dihedral"], np.random.default_rng(0)
    example = {"target": pixels(3, 3, 3)}
    seen = [dihedral(example, 1, rng)["target"].tobytes() for _ in range(800)]
    counts = [seen.count(each) for each in set(seen)]
    assert len(counts) == 8
    assert min(counts) > 60


def test_transforms_refuse():
    transforms, rng = photos.make_transforms(4), np.random.default_rng(0)
    with pytest.raises(DiscoError, match="needs 12 x 12"):
        transforms["random_patch"]({"target": pixels(11, 40, 3)}, 3, rng)
    with pytest.raises(DiscoError, match="at least `scale`"):
        transforms["degrade"]({"target": pixels(3, 40, 3)}, 3, rng)
    small = transforms["degrade"]({"target": pixels(12, 12, 3)}, 3, rng)
    for name in transforms:
        with pytest.raises(DiscoError, match="put it last"):
            transforms[name](small, 3, rng)
    with pytest.raises(DiscoError, match="`scale`"):
        photos.make_transforms(0)
