"""Segmentation: masks as their files have them, on their pixels; loss and mIoU."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter
from sklearn.metrics import confusion_matrix, jaccard_score

from disco_jax import tasks
from disco_jax.data import joint, preprocess, sources
from disco_jax.errors import DiscoError
from disco_jax.tasks.segmentation import Segmentation, mean_iou

COLOURS = np.random.default_rng(7).integers(0, 256, (256, 3), dtype=np.uint8)  # of the classes
COLOURS[255] = 124  # of what fills up


# Folders of masks


def write_masks(root, **counts):
    """Images as grey as eight times their number, 40 pixels wide and 20 tall; JPEG is not exact."""
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("water\nforest\nsnow\n")
    for split, count in counts.items():
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 20), (8 * i,) * 3).save(root / split / "images" / f"{i}.jpg")
            mask = np.full((20, 40), i % 3, np.uint8)
            mask[:, 30:] = 255
            image = Image.fromarray(mask)
            if i % 2:  # what counts of a palette is the index
                image.putpalette(np.arange(768)[::-1] % 256)
                assert image.mode == "P"
            image.save(root / split / "masks" / f"{i}.png")


def numbers(part):
    return [round(part[i]["image"][0, 0, 0] / 8) for i in range(len(part))]


def test_masks(tmp_path):
    write_masks(tmp_path, train=6, validation=4, test=3)
    parts = [sources.load(f"masks:{tmp_path}", split) for split in sources.SPLITS]
    assert [numbers(p) for p in parts] == [list(range(n)) for n in (6, 4, 3)]
    for part in parts:
        assert part.num_classes == 3
        for i, example in enumerate(part):
            assert example["image"].shape == (20, 40, 3)
            assert (example["mask"].shape, example["mask"].dtype) == ((20, 40), np.uint8)
            assert (example["mask"][:, :30] == i % 3).all()
            assert (example["mask"][:, 30:] == 255).all()


def test_masks_without_validation(tmp_path):
    write_masks(tmp_path, train=20, test=2)
    parts = {split: sources.load(f"masks:{tmp_path}", split) for split in sources.SPLITS}
    assert [len(p) for p in parts.values()] == [18, 2, 2]
    assert sorted(numbers(parts["train"]) + numbers(parts["validation"])) == list(range(20))
    for part in parts.values():
        assert [e["mask"][0, 0] for e in part] == [n % 3 for n in numbers(part)]


@pytest.mark.parametrize(
    ("size", "mode", "message"),
    [
        ((40, 20), "L", r"below the 3 classes of classes.txt.*numbers up to 3; write a grey"),
        ((40, 20), "RGB", r"shape \(20, 40, 3\) .*write a grey or palette image"),
        ((20, 40), "1", r"1.png has \(40, 20\) pixels, but its image \(20, 40\); write a mask of"),
        ((2000, 1000), "1", r"1.png cannot be read \(.*exceeds limit.*; replace the file"),
        ((0, 0), "", r"1.png cannot be read \(cannot identify.*; replace the file"),
    ],
)
def test_broken_masks(tmp_path, monkeypatch, size, mode, message):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900_000)
    write_masks(tmp_path, test=3)
    path = tmp_path / "test" / "masks" / "1.png"
    Image.new(mode, size, (3, 3, 3) if mode == "RGB" else 3).save(path) if mode else (
        path.write_bytes(b"GIF89a")
    )
    found = sources.load(f"masks:{tmp_path}", "test")
    assert found[0]["mask"].max() == 255
    with pytest.raises(DiscoError, match=message):
        found[1]


def test_missing_masks(tmp_path):
    with pytest.raises(DiscoError, match=r"masks:.*needs the file .*classes.txt with.*write it"):
        sources.load(f"masks:{tmp_path}", "test")
    write_masks(tmp_path, test=3)
    with pytest.raises(DiscoError, match=r"train/images` is not a folder; put the images"):
        sources.load(f"masks:{tmp_path}", "validation")
    (tmp_path / "test" / "masks" / "2.png").unlink()
    with pytest.raises(DiscoError, match=r"has 1 images without a mask.*/2.png; write them"):
        sources.load(f"masks:{tmp_path}", "test")
    shutil.rmtree(tmp_path / "test" / "images")
    (tmp_path / "test" / "images").mkdir()
    with pytest.raises(DiscoError, match=r"images` holds no images; put them there"):
        sources.load(f"masks:{tmp_path}", "test")


# Transforms


def example(height=90, width=120, seed=0):
    """Each pixel has the colour of its class; patches of 15 pixels."""
    rng = np.random.default_rng(seed)
    classes = np.array([0, 1, 2, 3, 255], np.uint8)
    patches = rng.choice(classes, (-(-height // 15), -(-width // 15)))
    mask = np.kron(patches, np.ones((15, 15), np.uint8))[:height, :width]
    return {"image": COLOURS[mask], "mask": mask}


def applied(name, given, seed, size=48):
    return joint.TRANSFORMS[name](given, size, np.random.default_rng(seed))


def check_colours(got):
    """Where classes meet, resized colours mix: checked is what is three pixels from there."""
    outside = {"mode": "constant", "cval": -1}  # of the crop there may be another class
    mask = got["mask"].astype(int)
    uniform = maximum_filter(mask, 7, **outside) == minimum_filter(mask, 7, **outside)
    assert uniform.mean() > 0.05
    apart = got["image"].astype(int) - COLOURS[got["mask"]]
    assert np.abs(apart[uniform]).max() <= 1


@pytest.mark.parametrize("name", ["mirror", "turn"])
def test_masks_go_along(name):
    given, seen = example(), set()
    for seed in range(30):
        got = applied(name, given, seed)
        np.testing.assert_array_equal(got["image"], COLOURS[got["mask"]])
        seen.add(got["mask"].tobytes())
    assert len(seen) == (2 if name == "mirror" else 4)


@pytest.mark.parametrize("shape", [(90, 120), (30, 100), (12, 13)])
def test_scale_crop(shape):
    for seed in range(30):
        got = applied("scale_crop", example(*shape, seed), seed)
        assert (got["image"].shape, got["mask"].shape) == ((48, 48, 3), (48, 48))
        assert set(np.unique(got["mask"])) <= {0, 1, 2, 3, 255}
        check_colours(got)


def test_scale_crop_scales_by_half_to_twice_and_cuts_anywhere():
    """Red is the column, green the row: the slope says by how much it was scaled."""
    image = np.zeros((200, 240, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(240), np.arange(200)[:, None]
    given, factors, corners = {"image": image, "mask": image[..., 0]}, [], []
    for seed in range(100):
        got = applied("scale_crop", given, seed)["image"].astype(int)
        slopes = (got[40, 40, :2] - got[4, 4, :2]) / 36
        assert abs(slopes[0] - slopes[1]) < 0.06
        factors.append(1 / slopes.mean())
        corners.append(got[0, 0, :2])
    assert 0.47 < min(factors) < 0.6
    assert 1.8 < max(factors) < 2.1
    assert np.min(corners) < 10
    assert (np.max(corners, 0) > 120).all()


@pytest.mark.parametrize(("shape", "kept"), [((90, 120), (36, 48)), ((200, 60), (48, 14))])
def test_fit_makes_large_images_smaller(shape, kept):
    got = applied("fit", example(*shape), 0)
    assert got["mask"].shape == (48, 48)
    assert got.pop("extent").tolist() == list(kept)
    assert (got["image"] != COLOURS[got["mask"]]).any()  # colours mix, classes do not
    outside = np.ones((48, 48), bool)
    outside[: kept[0], : kept[1]] = False
    assert (got["mask"][outside] == 255).all()
    assert (got["image"][outside] == 124).all()
    inside = {key: x[: kept[0], : kept[1]] for key, x in got.items()}
    known = np.unique(example(*shape)["mask"])
    np.testing.assert_array_equal(np.unique(inside["mask"]), known)
    check_colours(applied("fit", example(*shape), 0, size=96))


def test_fit_leaves_small_images_as_they_are():
    given = example(30, 48)
    got = applied("fit", given, 0)
    np.testing.assert_array_equal(got["image"], COLOURS[got["mask"]])
    np.testing.assert_array_equal(got["mask"][:30], given["mask"])
    assert (got["mask"][30:] == 255).all()


@pytest.mark.parametrize("name", ["distort", "fit", "mirror", "scale_crop", "turn"])
def test_transforms_of_masks_keep_their_word(name):
    """Repeatable by the generator, inputs untouched, uint8 in and out."""
    given, before = example(), example()
    for seed in range(10):
        got, again = (applied(name, given, seed) for _ in range(2))
        assert got.keys() - {"extent"} == given.keys()
        for key, x in got.items():
            np.testing.assert_array_equal(x, again[key])
            if key == "extent":
                continue
            np.testing.assert_array_equal(given[key], before[key])
            assert x.dtype == np.uint8
        if name == "distort":
            assert got["mask"] is given["mask"]


@pytest.mark.parametrize("name", ["distort", "fit", "scale_crop"])
def test_grey_images_have_one_channel(name):
    """And what happens to it happens to the same image in colour, but for saturation and hue."""
    grey = np.random.default_rng(0).integers(0, 256, (70, 90, 1), np.uint8)
    found = [
        joint.TRANSFORMS[name]({"image": image}, 48, np.random.default_rng(3))["image"]
        for image in (grey, np.repeat(grey, 3, -1))
    ]
    assert found[0].dtype == np.uint8
    if name != "distort":
        np.testing.assert_array_equal(np.repeat(found[0], 3, -1), found[1])
    assert found[0].shape == (*found[1].shape[:2], 1)


def test_masks_are_not_normalised():
    prepare = preprocess.Preprocess(48, ("scale_crop",), (0.5,) * 3, (0.25,) * 3)
    got = prepare(example(), np.random.default_rng(0))
    plain = applied("scale_crop", example(), 0)
    np.testing.assert_array_equal(got["mask"], plain["mask"])
    close(got["image"], (plain["image"] / 255 - 0.5) / 0.25, 1e-6)
    for name in ("flip", "resize", "expand", "degrade"):  # would leave the mask as it is
        with pytest.raises(DiscoError, match=rf"{name!r}, but of an example with `mask` must be"):
            preprocess.Preprocess(48, (name,), (0.5,) * 3, (0.25,) * 3)(example(), None)


# Loss


def case(seed=0, images=3, classes=30, dtype=np.uint8):
    """Logits and a batch with ignored pixels; uint8, as masks come from files."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, classes, (images, 7, 9)).astype(dtype)
    mask[rng.random(mask.shape) < 0.3] = 255
    logits = rng.normal(size=(*mask.shape, classes)).astype(np.float32)
    right = rng.random(mask.shape) < 0.5
    logits[right, np.where(mask < classes, mask, 0)[right]] += 3
    return logits, {"mask": mask, "weight": np.ones(images, np.float32)}


def test_loss_by_hand():
    """Three pixels count, two of one image and one of the other."""
    logits = np.array([[[[0, 0], [0, np.log(3)]]], [[[np.log(7), 0], [50, -50]]]])
    batch = {"mask": np.array([[[0, 1]], [[1, 255]]])}
    loss = jax.jit(Segmentation(2).loss)(logits, batch)
    close(loss, (np.log(2) + np.log(4 / 3) + np.log(8)) / 3, 1e-6)
    other = {"mask": np.array([[[0, 1]], [[1, 0]]])}  # 1 is ignored; of the last the loss is 0
    close(Segmentation(2, ignore=1).loss(logits, other), np.log(2) / 2, 1e-6)


def test_loss_is_torchs():
    torch = pytest.importorskip("torch")
    logits, batch = case()
    theirs = torch.from_numpy(logits).requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        theirs.movedim(-1, 1), torch.from_numpy(batch["mask"]).long(), ignore_index=255
    )
    expected.backward()
    loss, gradient = jax.jit(jax.value_and_grad(Segmentation(30).loss))(logits, batch)
    close(loss, expected.detach().numpy(), 1e-5)
    close(gradient, theirs.grad.numpy(), 1e-5)


def test_loss_of_an_auxiliary_head():
    (main, batch), (side, _) = case(0), case(1)
    for task, weight in ((Segmentation(30), 0.4), (Segmentation(30, auxiliary_weight=2.0), 2.0)):
        parts = [task.loss(x, batch) for x in (main, side)]
        close(task.loss((main, side), batch), parts[0] + weight * parts[1], 1e-6)


def test_loss_is_wide_and_finite():
    logits, batch = case()
    half = jnp.asarray(logits, jnp.bfloat16)
    loss = Segmentation(30).loss(half, batch)
    assert loss.dtype == jnp.float32
    close(loss, Segmentation(30).loss(half.astype(jnp.float32), batch), 1e-7)
    nothing = {"mask": np.full_like(batch["mask"], 255)}
    loss, gradient = jax.value_and_grad(Segmentation(30).loss)(logits, nothing)
    assert loss == 0
    assert not np.any(gradient)


def test_imitation_is_of_the_main_head():
    (student, _), (side, _), (teacher, _) = (case(seed) for seed in range(3))
    q, p = (np.asarray(jax.nn.log_softmax(x / 2)) for x in (student, teacher))
    expected = 4 * np.mean(np.sum(np.exp(p) * (p - q), -1))
    for outputs in (student, (student, side)):
        close(Segmentation(30).imitation(outputs, teacher, 2.0), expected, 1e-5)


# mIoU


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_measures_are_scikit_learns(dtype):
    task, found, truth, answers = Segmentation(30), [], [], []
    for seed in range(3):
        logits, batch = case(seed, dtype=dtype)
        found.append(jax.device_get(jax.jit(task.measure)(logits, batch)))
        counts = batch["mask"] != 255
        truth.append(batch["mask"][counts])
        answers.append(logits.argmax(-1)[counts])
        expected = confusion_matrix(truth[-1], answers[-1], labels=range(30))
        np.testing.assert_array_equal(found[-1]["confusion"], expected)
        assert found[-1]["count"] == counts.sum()
        close(found[-1]["loss"], task.loss(logits, batch) * counts.sum(), 1e-5)
    truth, answers = np.concatenate(truth), np.concatenate(answers)
    summary = task.summary(found)
    close(summary["mIoU"], jaccard_score(truth, answers, average="macro"), 1e-9)
    close(summary["pixel accuracy"], np.mean(truth == answers), 1e-9)
    close(summary["loss"], sum(f["loss"] for f in found) / len(truth), 1e-6)
    assert summary.keys() == {task.metric, "pixel accuracy", "loss"}


def test_classes_that_do_not_occur_do_not_count():
    truth, answers = np.array([0, 0, 4, 4, 7]), np.array([0, 4, 4, 4, 2])
    expected = jaccard_score(truth, answers, average="macro", zero_division=0)
    close(mean_iou(confusion_matrix(truth, answers, labels=range(9)).astype(float)), expected, 1e-9)
    close(expected, (1 / 2 + 2 / 3 + 0 + 0) / 4, 1e-9)
    assert mean_iou(np.zeros((9, 9))) == 0


def test_ignored_pixels_and_fill_count_nowhere():
    task, (logits, batch) = Segmentation(30), case()
    batch["weight"][2] = 0
    measured = jax.jit(task.measure)(logits, batch)
    alone = jax.jit(task.measure)(logits[:2], {k: v[:2] for k, v in batch.items()})
    other = logits.copy()
    other[batch["mask"] == 255] = np.random.default_rng(9).normal(size=30)
    other[2] = 0
    for again in (alone, jax.jit(task.measure)(other, batch)):
        np.testing.assert_array_equal(measured["confusion"], again["confusion"])
        assert measured["count"] == again["count"] == (batch["mask"][:2] != 255).sum()
        close(measured["loss"], again["loss"], 1e-6)
    nothing = jax.jit(task.measure)(logits, dict(batch, weight=np.zeros(3, np.float32)))
    assert task.summary([nothing]) == {"mIoU": 0, "pixel accuracy": 0, "loss": 0}
    assert task.summary([measured, nothing]) == task.summary([measured])


def test_more_pixels_than_float32_can_count():
    logits, mask = jnp.zeros((1, 4099, 4099, 1), jnp.bfloat16), np.zeros((1, 4099, 4099), np.uint8)
    batch = {"mask": mask, "weight": np.ones(1, np.float32)}
    found = jax.jit(Segmentation(1).measure)(logits, batch)
    assert int(found["confusion"][0, 0]) == int(found["count"]) == 4099**2 > 2**24


def test_task_by_name():
    task = tasks.make("segmentation", {"auxiliary_weight": 0.1}, {"num_classes": 4, "mean": (0,)})
    assert task == Segmentation(4, auxiliary_weight=0.1)
    assert (task.metric, task.unit) == ("mIoU", "%")
    with pytest.raises(DiscoError, match=r"`task` 'segmentation' does not have threshold, but"):
        tasks.make("segmentation", {"threshold": 0.1}, {"num_classes": 4})
