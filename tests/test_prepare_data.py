"""The data sets of experiments/prepare_data.py: exact labels, disjoint splits, repeatable."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from disco_jax.errors import DiscoError

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import prepare_data
import prepare_land
import prepare_photos
import prepare_scenes

SPLITS = ("train", "validation", "test")
FEW = ["--scenes", "30", "8", "8", "--scene-size", "64"]


def package(name, root, licences=None):
    files = tuple(path for path in root.rglob("*") if path.is_file())
    return prepare_data.Package(name, "1.0", root, files[::-1], licences or {"*": "free"})


def disc(colour, size=(40, 30), soft=True):
    """A stamp: a disc on nothing, with a soft edge or a hard one."""
    fine = 4 if soft else 1
    image = Image.new("RGBA", (fine * size[0], fine * size[1]))
    ImageDraw.Draw(image).ellipse((9, 9, fine * size[0] - 12, fine * size[1] - 12), fill=colour)
    return image.resize(size, Image.Resampling.BOX)


def make_stamps(root):
    for place in prepare_scenes.CLASSES.values():
        folder = root / "stamps" / place
        folder.mkdir(parents=True)
        for i in range(5):
            disc("white", (40 - i, 30)).save(folder / f"s{i}.png")
        disc("white").save(folder / "s0_mirror.png")
        disc("white").save(folder / "s0.gif")


def make_photographs(root):
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        coarse = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((800 + i, 520), 0).save(root / f"p{i}.jpg")
    Image.open(root / "p1.jpg").resize((1600, 1040)).save(root / "p1_large.jpg", quality=60)
    os.symlink(root / "p2.jpg", root / "p2_link.jpg")
    Image.new("RGB", (900, 600), "red").save(root / "Autumn.jpg")
    Image.new("RGB", (900, 600), "blue").save(root / "drawn.png")
    Image.new("RGB", (500, 600), "green").save(root / "narrow.jpg")


def make_globe(root):
    root.mkdir()
    rng = np.random.default_rng(1)
    cover = rng.integers(0, 17, (64, 768), dtype=np.uint8).repeat(8, 0).repeat(4, 1)
    cover[:8] = 255
    cover[256:, :1024] = 0  # water south of the western bands
    Image.fromarray(cover).save(root / prepare_data.COVER[1])
    colours = np.repeat(cover[::2, ::2, None] * 15, 3, 2)
    Image.fromarray(colours).save(root / prepare_data.PICTURE[1], quality=95)


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    make_stamps(tmp_path / prepare_data.STAMPS)
    make_photographs(tmp_path / "mate-backgrounds")
    make_globe(tmp_path / "globe")
    monkeypatch.setattr(prepare_data, "debian", lambda name: package(name, tmp_path / name))
    monkeypatch.setattr(prepare_data, "wheel", lambda name: package(name, tmp_path / "globe"))


def annotations(folder):
    return {s: json.loads((folder / s / "annotations.json").read_text()) for s in SPLITS}


def box_in_image(seen):
    rows, columns = np.nonzero(seen)
    left, top = columns.min(), rows.min()
    return [left, top, columns.max() + 1 - left, rows.max() + 1 - top]


def test_boxes_are_those_of_the_visible_pixels():
    """Red, green and blue discs on black: each pixel tells whose it is."""
    colours, covered = ("#ff0000", "#00ff00", "#0000ff"), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        stamps = [np.asarray(disc(colour, soft=False)) for colour in colours]
        scene, owner = prepare_scenes.compose(np.zeros((64, 64, 3), np.uint8), stamps, rng)
        found = prepare_scenes.annotations_of(owner, [(4, "a"), (7, "b"), (2, "c")])
        for annotation in found:
            channel = "abc".index(annotation["stamp"])
            assert annotation["category_id"] == (5, 8, 3)[channel]
            seen = scene[..., channel] > 127
            assert annotation["bbox"] == box_in_image(seen)
            assert annotation["area"] == seen.sum()
            whole = (stamps[channel][..., 3] > 127).sum()
            assert 2 * seen.sum() >= whole
            covered += seen.sum() < whole
        assert {a["stamp"] for a in found} == {"abc"[c] for c in range(3) if scene[..., c].any()}
    assert covered > 5


def test_soft_edges_count_from_the_half():
    stamp, black = np.asarray(disc("white")), np.zeros((64, 64, 3), np.uint8)
    scene, owner = prepare_scenes.compose(black, [stamp], np.random.default_rng(0))
    (found,) = prepare_scenes.annotations_of(owner, [(0, "a")])
    assert found["bbox"] == box_in_image(scene[..., 0] > 127) != box_in_image(scene[..., 0] > 0)
    assert found["area"] == (scene[..., 0] > 127).sum()


def test_a_stamp_that_would_hide_another_is_left_out():
    """Over a stamp as large as the scene goes one of half that size, but none that is larger."""
    full, black = np.full((32, 32, 4), 255, np.uint8), np.zeros((32, 32, 3), np.uint8)
    for rows, shows in ((32, False), (17, False), (16, True)):
        stamps = [full, full[:rows]]
        _, owner = prepare_scenes.compose(black, stamps, np.random.default_rng(0))
        assert (owner == 1).sum() == 32 * rows * shows
        assert (owner >= 0).all()


def test_scenes_on_disk(tmp_path):
    """White stamps on dark photographs: the JPEG files are bright where the boxes say, and only."""
    make_stamps(tmp_path / "s")
    (tmp_path / "p").mkdir()
    (tmp_path / "out").mkdir()
    for i in range(3):
        image = np.zeros((520, 1600, 3), np.uint8)
        image[:, : 400 * (i + 1)] = 80
        Image.fromarray(image).save(tmp_path / "p" / f"p{i}.jpg")
    stamps, photos = (package(name, tmp_path / name).files for name in "sp")
    counts = dict.fromkeys(SPLITS, 10)
    prepare_scenes.build(tmp_path / "out", stamps, photos, counts, size=64, seed=0)
    for split, found in annotations(tmp_path / "out").items():
        names = {c["id"]: c["name"] for c in found["categories"]}
        assert list(names.items()) == list(enumerate(prepare_scenes.CLASSES, start=1))
        for a in found["annotations"]:
            folder, _, _ = a["stamp"].rpartition("/")
            assert folder == prepare_scenes.CLASSES[names[a["category_id"]]]
        for image in found["images"]:
            path = tmp_path / "out" / split / "images" / image["file_name"]
            bright = np.asarray(Image.open(path))[..., 1] > 180
            boxes = np.zeros((64, 64), bool)
            for a in found["annotations"]:
                if a["image_id"] == image["id"]:
                    x, y, w, h = a["bbox"]
                    boxes[y : y + h, x : x + w] = True
            assert not bright[~boxes].any()
            differences = np.subtract(box_in_image(bright), box_in_image(boxes))
            assert np.abs(differences).max() <= 1


def test_no_stamp_or_photograph_in_two_splits(fakes, tmp_path):
    prepare_data.main([f"--out={tmp_path / 'out'}", "--what", "scenes", *FEW])
    found = annotations(tmp_path / "out" / "scenes")
    assert [len(found[s]["images"]) for s in SPLITS] == [30, 8, 8]
    for key, part in (("photograph", "images"), ("stamp", "annotations")):
        seen = [{entry[key] for entry in found[s][part]} for s in SPLITS]
        assert all(seen)
        assert len(set.union(*seen)) == sum(map(len, seen))
        assert not any(name.endswith("_mirror") for name in set.union(*seen))


def test_photographs(fakes, tmp_path):
    """The larger copy stays; links, drawings and what is too small do not."""
    prepare_data.main([f"--out={tmp_path / 'out'}", "--what", "photos"])
    names = {s: [p.stem for p in (tmp_path / "out/photos" / s).iterdir()] for s in SPLITS}
    assert sorted(itertools.chain(*names.values())) == ["p0", "p1_large", "p2", "p3", "p4", "p5"]
    assert [len(names[s]) for s in SPLITS] == [4, 1, 1]
    for split in SPLITS:
        for path in (tmp_path / "out/photos" / split).iterdir():
            original = Image.open(tmp_path / "mate-backgrounds" / f"{path.stem}.jpg").size
            halved = tuple(round(side / 2) for side in original)
            assert Image.open(path).size == (halved if split == "train" else (384, 252))


def test_large_photographs_are_reduced_to_1500_pixels(tmp_path):
    Image.new("RGB", (4000, 2000)).save(tmp_path / "x.jpg")
    assert prepare_photos.reduced(tmp_path / "x.jpg").size == (1500, 750)


def test_the_crop_is_where_the_detail_is():
    image = np.zeros((700, 900), np.uint8)
    image[378:630, 384:768] = np.random.default_rng(0).integers(0, 256, (252, 384))
    crop = prepare_photos.detailed_crop(Image.fromarray(image))
    np.testing.assert_array_equal(np.asarray(crop), image[378:630, 384:768])


def test_land(fakes, tmp_path):
    """Splits share no longitude; masks are the merged classes of the map, at the tile's place."""
    prepare_data.main([f"--out={tmp_path / 'out'}", "--what", "land"])
    maps = (tmp_path / "globe" / file for _, file in (prepare_data.COVER, prepare_data.PICTURE))
    cover, picture = (np.asarray(Image.open(path)) for path in maps)
    cover = cover[1::2, 1::2]
    # IGBP: water, five forests, two shrublands, two savannas, grassland, wetland, cropland, urban,
    # mosaic, snow, barren.
    expected = np.array([0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 255, 5, 255, 5, 6, 7] + [255] * 239)
    columns, corners = {}, {}
    for split in SPLITS:
        masks = sorted((tmp_path / "out/land" / split / "masks").iterdir())
        corners[split] = [(int(m.stem[1:5]), int(m.stem[7:])) for m in masks]
        columns[split] = {x for left, _ in corners[split] for x in range(left, left + 128)}
        for path, (left, top) in zip(masks, corners[split], strict=True):
            window = np.s_[top : top + 128, left : left + 128]
            mask, image = Image.open(path), Image.open(path.parents[1] / "images" / path.name)
            assert mask.mode == "L"
            np.testing.assert_array_equal(np.asarray(mask), expected[cover[window]])
            np.testing.assert_array_equal(np.asarray(image), picture[window])
            assert ((cover[window] > 0) & (cover[window] < 255)).mean() > 0.2
    assert len(set.union(*columns.values())) == sum(map(len, columns.values()))
    assert {left % 128 for left, _ in corners["train"]} == {0, 64}
    assert all(left % 128 == top % 128 == 0 for left, top in corners["test"])
    # Bands of 256 pixels: validation, train, test, train, train; the south of the first is water.
    northern = [(0, 0), (128, 0), (1280, 0), (1408, 0)]
    assert corners["validation"] == sorted([*northern, (1280, 128), (1408, 128)])
    names = (tmp_path / "out/land/classes.txt").read_text().splitlines()
    assert names == list(prepare_land.CLASSES)


def test_two_runs_are_equal(fakes, tmp_path):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    prepare_data.main([f"--out={one}", *FEW])
    prepare_data.main([f"--out={two}", *FEW])
    prepare_data.main([f"--out={other}", "--what", "scenes", "photos", "--seed=1", *FEW])
    for name in ("scenes", "land", "photos"):
        checksums = (one / name / "CHECKSUMS").read_text()
        assert checksums == (two / name / "CHECKSUMS").read_text()
        if name != "land":
            assert checksums != (other / name / "CHECKSUMS").read_text()
        files = {p for p in (one / name).rglob("*") if p.is_file() and p.name != "CHECKSUMS"}
        for digest, file in (line.split("  ") for line in checksums.splitlines()):
            assert hashlib.sha256((one / name / file).read_bytes()).hexdigest() == digest
            files.remove(one / name / file)
        assert not files
    assert sorted(p.name for p in one.iterdir()) == ["land", "photos", "scenes"]


def test_what_is_there_stays_unless_forced(fakes, tmp_path):
    photos = ["--out", str(tmp_path / "out"), "--what", "photos"]
    prepare_data.main(photos)
    mark = tmp_path / "out/photos/mark"
    mark.touch()
    prepare_data.main(photos)
    assert mark.exists()
    prepare_data.main([*photos, "--force"])
    assert not mark.exists()
    (tmp_path / "out/photos/CHECKSUMS").unlink()
    with pytest.raises(DiscoError, match=r"photos` is there.*--force"):
        prepare_data.main(photos)


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupted(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_data.prepare(tmp_path / "out", "photos", interrupted, force=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_package_is_named():
    with pytest.raises(DiscoError, match=r"`no-such-stamps`.*`apt-get install no-such-stamps`"):
        prepare_data.debian("no-such-stamps")
    with pytest.raises(DiscoError, match=r"`no-such-globe`.*`pip install no-such-globe`"):
        prepare_data.wheel("no-such-globe")


def test_licences_are_listed(tmp_path):
    assert prepare_data.wheel("disco_jax").licences["*"].startswith("Apache-2.0")
    text = (
        "Format: 1.0\n\nFiles: *\nCopyright: 2001 A\nLicense: GPL-2+\n Long.\n\n"
        "Files: nature/Aqua.jpg\n  nature/B.jpg\nCopyright: 2008, C <c@d>\n  2009, E\n"
        "License: CC-BY-4.0\n\n\nFiles: debian/*\nCopyright: F\nLicense: MIT\n\nLicense: MIT\n X.\n"
    )
    named = "CC-BY-4.0, Copyright 2008, C <c@d> 2009, E"
    stated = prepare_data.stated_licences(text)
    assert stated == {"*": "GPL-2+, Copyright 2001 A", "Aqua.jpg": named, "B.jpg": named}
    for name in ("Aqua.jpg", "other.jpg", "unused.jpg"):
        (tmp_path / name).touch()
    own = package("backgrounds", tmp_path, stated)
    assert prepare_data.sources([own], [tmp_path / "other.jpg", tmp_path / "Aqua.jpg"]) == [
        f"backgrounds 1.0\tAqua.jpg\t{named}",
        "backgrounds 1.0\tother.jpg\tGPL-2+, Copyright 2001 A",
    ]
