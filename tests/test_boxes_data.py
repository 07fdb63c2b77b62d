"""Data for detection: boxes as their files have them, and on their objects whatever is done."""

import colorsys

import numpy as np
import pytest

from disco_jax.data import images, joint, pipeline, preprocess, sources
from disco_jax.errors import DiscoError

HEIGHT, WIDTH = 90, 120
BLUES = (200, 210, 220, 230)  # of the objects
FLAGS = ("difficult", "crowd")


def picture(seed=0):
    """Red is the column, green the row, blue the object: a rectangle in each quarter, or none."""
    rng = np.random.default_rng(seed)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(WIDTH), np.arange(HEIGHT)[:, None]
    for number, blue in enumerate(BLUES):
        top, left = (number // 2) * HEIGHT // 2, (number % 2) * WIDTH // 2
        tall, wide = 1 + 2 * rng.integers([22, 30])  # odd: no centre is at an edge of pixels
        y, x = top + rng.integers(46 - tall), left + rng.integers(61 - wide)
        image[y : y + tall, x : x + wide, 2] = blue
    return image


def boxes_in(image):
    """Blue to the corners around it, in pixels."""
    found = {}
    for blue in BLUES:
        rows, columns = np.nonzero(image[..., 2] == blue)
        if len(rows):
            found[blue] = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return found


def example(seed=0):
    image = picture(seed)
    boxes = np.array(list(boxes_in(image).values()), np.float32)
    flags = np.random.default_rng(seed).random((2, len(BLUES))) < 0.5
    return {
        "image": image,
        "boxes": boxes / np.array([WIDTH, HEIGHT] * 2, np.float32),
        "classes": np.array(BLUES, np.int32),
        **dict(zip(FLAGS, flags, strict=True)),
    }


def pixels(example):
    """The example's boxes in pixels of its image."""
    height, width = example["image"].shape[:2]
    assert example["boxes"].dtype == np.float32
    return example["boxes"] * [width, height, width, height]


def applied(name, given, seed):
    return joint.TRANSFORMS[name](given, 32, np.random.default_rng(seed))


def prepared(*transforms, size=0, **options):
    return preprocess.Preprocess(size, transforms, (0.0,) * 3, (1.0,) * 3, **options)


# Scenes


@pytest.mark.parametrize("split", sources.SPLITS)
def test_scenes_have_tight_boxes(split):
    """Recomputed from the ink of the same scenes in ``segments``."""
    found, masks = sources.load("scenes", split), sources.load("segments", split)
    assert len(found) == len(masks)
    assert (found.num_classes, masks.num_classes) == (10, 11)
    counts = set()
    for index in (*range(60), len(found) - 1):
        scene, segments = found[index], masks[index]
        np.testing.assert_array_equal(scene["image"], segments["image"])
        assert set(scene["classes"] + 1) == set(np.unique(segments["mask"])) - {0}
        assert scene["boxes"].dtype == np.float32
        for label in set(scene["classes"]):  # those of one class all together
            rows, columns = np.nonzero(segments["mask"] == label + 1)
            own = scene["boxes"][scene["classes"] == label] * 64
            np.testing.assert_array_equal(own[:, :2].min(0), [columns.min(), rows.min()])
            np.testing.assert_array_equal(own[:, 2:].max(0), [columns.max() + 1, rows.max() + 1])
        counts.add(len(scene["boxes"]))
    assert counts >= {1, 2, 3}


def test_ink_is_where_the_scene_is_bright():
    scene = sources.load("segments", "test")[0]
    grey = scene["image"][..., 0]
    assert grey[scene["mask"] > 0].min() >= 96
    assert grey[scene["mask"] == 0].max() < 79 + 59 + 1  # the stripes at their brightest


def test_scenes_are_made_of_their_own_splits_digits():
    kept = {}
    for split in sources.SPLITS:
        found, digits = sources.load("scenes", split), sources.load("digits", split)
        np.testing.assert_array_equal(found.digits, digits.images[..., 0])
        np.testing.assert_array_equal(found.labels, digits.labels)
        kept[split] = {bytes(digit) for digit in found.digits}
    assert len(set.union(*kept.values())) == sum(map(len, kept.values())) == 1797
    assert len({sources.load("scenes", split).seed for split in sources.SPLITS}) == 3


def test_scenes_end_and_are_always_the_same():
    found = sources.load("scenes", "validation")
    np.testing.assert_array_equal(found[7]["image"], found[7]["image"])
    np.testing.assert_array_equal(found[-1]["image"], found[199]["image"])
    assert len(found) == 200
    with pytest.raises(IndexError):
        found[200]


def test_repeated():
    source = images.ArraySource(np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1), np.arange(3), 7)
    repeated = images.Repeated(source, 2)
    assert [repeated[i]["label"] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    with pytest.raises(IndexError):
        repeated[6]
    assert (len(repeated), repeated.num_classes, repeated[-1]["label"]) == (6, 7, 2)
    with pytest.raises(DiscoError, match=r"`data.repeat` \(=0\) must be at least 1; set it to 1"):
        images.Repeated(source, 0)


# Transforms


@pytest.mark.parametrize("name", ["mirror", "turn", "expand"])
def test_boxes_go_along(name):
    """Every object's box, recomputed from its pixels."""
    seen = []
    for seed in range(40):
        given = example(seed)
        got = applied(name, given, seed)
        expected = boxes_in(got["image"])
        assert len(expected) == len(BLUES)
        np.testing.assert_allclose(pixels(got), list(expected.values()), atol=0.01)
        for key in ("classes", *FLAGS):
            assert got[key] is given[key]
        seen.append((got["image"].shape, *got["image"][0, 0, :2]))
    changed = sum(s != ((HEIGHT, WIDTH, 3), 0, 0) for s in seen)
    assert (20 < changed < 40) if name == "turn" else (10 < changed < 30)
    if name == "turn":
        assert len(set(seen)) == 4


def test_expand_is_a_grey_canvas_around_the_whole_picture():
    ratios = []
    for seed in range(60):
        got = applied("expand", example(), seed)["image"]
        top, left = np.argwhere((got[..., :2] == 0).all(-1))[0]
        whole = np.full_like(got, 124)
        whole[top : top + HEIGHT, left : left + WIDTH] = picture()
        np.testing.assert_array_equal(got, whole)
        ratios.append(np.divide(got.shape[:2], (HEIGHT, WIDTH)))
    ratios = np.array(ratios)
    np.testing.assert_allclose(ratios[:, 0], ratios[:, 1], atol=1 / HEIGHT)
    assert 3.5 < ratios.max() <= 4
    assert ratios.min() == 1


@pytest.mark.parametrize("least", [0.0, 0.1, 0.5])
def test_overlap_crop(monkeypatch, least):
    """A centre inside stays, cut at the border; every other object goes."""
    monkeypatch.setattr(joint, "LEAST_OVERLAPS", (least,))
    cut = gone = 0
    for seed in range(150):
        given = example(seed)
        got = applied("overlap_crop", given, seed)
        x1, y1 = got["image"][0, 0, :2].astype(int)  # red and green say which patch it is
        x2, y2 = got["image"][-1, -1, :2].astype(int) + 1
        np.testing.assert_array_equal(got["image"], given["image"][y1:y2, x1:x2])
        before = pixels(given)
        centres = (before[:, :2] + before[:, 2:]) / 2
        stays = ((centres > [x1, y1]) & (centres < [x2, y2])).all(1)
        for key in ("classes", *FLAGS):
            np.testing.assert_array_equal(got[key], given[key][stays])
        visible = boxes_in(got["image"])
        expected = np.array([visible[blue] for blue in got["classes"]])
        np.testing.assert_allclose(pixels(got), expected, atol=0.01)
        if got["image"].shape == given["image"].shape:
            continue
        areas = (before[stays, 2:] - before[stays, :2]).prod(1)
        common = (expected[:, 2:] - expected[:, :2]).prod(1)
        assert (common / (areas + (x2 - x1) * (y2 - y1) - common)).max() >= least - 1e-5
        assert 0.5 - 0.05 < (x2 - x1) / (y2 - y1) < 2 + 0.05
        cut += (common < areas - 1e-3).sum()
        gone += (~stays).sum()
    assert min(cut, gone) > 5


def test_overlap_crop_may_leave_the_image_whole(monkeypatch):
    monkeypatch.setattr(joint, "LEAST_OVERLAPS", (None,))
    given = example()
    assert all(applied("overlap_crop", given, seed) is given for seed in range(5))


def test_all_of_ssds_transforms_together():
    """One bright object, resized: its box is within a pixel of where it is bright."""
    prepare = prepared(
        "distort", "expand", "overlap_crop", "turn", "resize", "mirror", size=160, max_objects=3
    )
    cropped = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        left, top, wide, tall = (*rng.integers(0, 60, 2), *rng.integers(40, 60, 2))
        image = np.full((150, 130, 3), 124, np.uint8)
        image[top : top + tall, left : left + wide] = 250
        box = np.array([[left, top, left + wide, top + tall]]) / [130, 150, 130, 150]
        given = {"image": image, "boxes": box.astype(np.float32), "classes": np.array([5])}
        got = prepare(given, rng)
        assert got["classes"].tolist() == [5, -1, -1]
        levels = got["image"][..., 0]
        bright = levels > (levels.min() + levels.max()) / 2
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        if np.ptp(levels) > 0.1:  # more is seen than the object
            np.testing.assert_allclose(got["boxes"][0] * 160, found, atol=1.01)
            cropped += (got["boxes"][0] <= 0).any() or (got["boxes"][0] >= 1).any()
    assert cropped > 3


def test_distort_changes_colours_alone():
    """Equal colours stay equal, grey stays grey, boxes stay."""
    rng = np.random.default_rng(0)
    grey = np.full((20, 30, 3), 100, np.uint8)
    image = grey.copy()
    image[:, 15:] = rng.integers(0, 256, 3)
    given, levels, colours = {"image": image, "boxes": rng.random((1, 4))}, [], set()
    for seed in range(60):
        got = applied("distort", given, seed)
        assert got["boxes"] is given["boxes"]
        assert np.ptp(got["image"][:, :15], (0, 1)).max() == 0
        assert np.ptp(got["image"][:, 15:], (0, 1)).max() == 0
        colours.add(tuple(got["image"][0, -1]))
        plain = applied("distort", {"image": grey}, seed)["image"]
        assert np.ptp(plain) == 0  # one level of grey: contrast and colours do nothing to it
        levels.append(plain[0, 0, 0])
    assert len(colours) > 30
    assert min(levels) >= 87
    assert max(levels) <= 113
    assert 15 < np.sum(np.array(levels) == 100) < 45


def test_distort_turns_hues_by_up_to_18_degrees():
    red = np.full((4, 4, 3), (160, 80, 80), np.uint8)
    found = [applied("distort", {"image": red}, seed)["image"][0, 0] / 255 for seed in range(60)]
    turned = np.array([colorsys.rgb_to_hsv(*colour)[0] for colour in found])
    degrees = 360 * np.minimum(turned, 1 - turned)
    assert 14 < degrees.max() < 22


@pytest.mark.parametrize("name", ["distort", "expand", "mirror", "overlap_crop", "turn"])
def test_transforms_of_boxes_keep_their_word(name):
    """Repeatable by the generator, inputs untouched, images without boxes as welcome as others."""
    empty = {key: x if key == "image" else x[:0] for key, x in example().items()}
    for given in (example(), empty):
        before = {key: x.copy() for key, x in given.items()}
        for seed in range(20):
            got, again = (applied(name, given, seed) for _ in range(2))
            assert got.keys() == given.keys()
            for key, x in got.items():
                np.testing.assert_array_equal(x, again[key])
                np.testing.assert_array_equal(given[key], before[key])
                assert (x.dtype, x.shape[1:]) == (given[key].dtype, given[key].shape[1:]) or (
                    key == "image"
                )
            assert got["image"].dtype == np.uint8
            if given is empty:
                assert all(len(got[key]) == 0 for key in ("boxes", "classes", *FLAGS))


# What a batch takes


def test_boxes_are_filled_up():
    given = example()
    none = {key: x if key == "image" else x[:0] for key, x in given.items()}
    prepare, rng = prepared(max_objects=6), np.random.default_rng(0)
    batch = pipeline.stack([prepare(e, rng) for e in (given, none)])
    assert batch["boxes"].shape == (2, 6, 4)
    for key, fill in (("boxes", 0), ("classes", -1), ("difficult", False), ("crowd", False)):
        np.testing.assert_array_equal(batch[key][0, :4], given[key])
        assert batch[key].dtype == given[key].dtype
        assert (batch[key][0, 4:] == fill).all()
        assert (batch[key][1] == fill).all()
    full = prepared(max_objects=4)(given, rng)
    np.testing.assert_array_equal(full["boxes"], given["boxes"])
    np.testing.assert_array_equal(full["image"], given["image"].astype(np.float32) / 255)
    with pytest.raises(DiscoError, match=r"has 4 boxes, but `data.max_objects` \(=3\).*higher"):
        prepared(max_objects=3)(given, rng)


def test_image_and_target_are_normalised_any_size():
    prepare = preprocess.Preprocess(0, (), (0.5, 0.0, 1.0), (0.5, 1.0, 0.1))
    given = {"image": np.full((3, 5, 3), 255, np.uint8), "target": np.zeros((6, 10, 3), np.uint8)}
    got = prepare(given, np.random.default_rng(0))
    np.testing.assert_allclose(got["image"], np.broadcast_to([1, 1, 0], (3, 5, 3)), atol=1e-6)
    np.testing.assert_allclose(got["target"], np.broadcast_to([-1, 0, -10], (6, 10, 3)), atol=1e-6)
    assert got["image"].dtype == got["target"].dtype == np.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prepared("flop"), r"`transforms` contains 'flop', but must be among"),
        (lambda: prepared(size=-2), r"`data.size` \(=-2\) must be at least 1 pixel.*0"),
        (
            lambda: prepared("resize", "rgb"),
            r"`data.size` \(=0\) must be at least 1 pixel.*such as resize; set a size",
        ),
        (
            lambda: prepared("flip")(example(), None),
            r"`transforms` contains 'flip', but of an example with `boxes` must be among.*mirror",
        ),
        (
            lambda: prepared("mirror", "scale_crop", "fit", size=9)(example(), None),
            r"contains 'scale_crop', 'fit', but of an example with `boxes`",
        ),
        (
            lambda: prepared("expand")({"image": picture(), "label": 1}, None),
            r"contains 'expand', but of an example with `label`",
        ),
        (
            lambda: prepared("mirror", size=64)(example(), np.random.default_rng(0)),
            r"`image` has shape \(90, 120, 3\).*must be \(64, 64, 3\); add a resize",
        ),
    ],
)
def test_transforms_that_do_not_suit(make, message):
    with pytest.raises(DiscoError, match=message):
        make()
