"""Detection and segmentation: sets from COCO, VOC and TFDS; schedules of the learning rate."""

import json
import shutil
import sys

import numpy as np
import optax
import pytest
from PIL import Image

from disco_jax.data import sources, voc
from disco_jax.errors import DiscoError
from disco_jax.train.optimizer import learning_rate

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}]
BOXES = [  # of one image, 40 pixels wide and 20 tall
    {"category_id": 17, "bbox": [4, 5, 20, 10], "iscrowd": 0},
    {"category_id": 90, "bbox": [0, 0, 40, 20], "iscrowd": 1},
    {"category_id": 3, "bbox": [0.5, 19, 1, 1]},
]
STEP = 8  # grey levels from one image to the next: JPEG is not exact
CORNERS = [[0.1, 0.25, 0.6, 0.75], [0, 0, 1, 1], [0.0125, 0.95, 0.0375, 1]]


def write_image(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20), (STEP * number,) * 3).save(path)


def coco_content(count):
    """Images ``count - 1`` to 0, of which every other has boxes; each is as grey as its number."""
    found = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 20} for i in range(count)]
    objects = [{"image_id": i["id"], **box} for i in found[::2] for box in BOXES]
    return {"images": found[::-1], "annotations": objects, "categories": CATEGORIES}


def write_coco(file, folder, count):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(coco_content(count)))
    for i in range(count):
        write_image(folder / f"{i}.png", i)


def write_own_layout(root, **counts):
    for split, count in counts.items():
        write_coco(root / split / "annotations.json", root / split / "images", count)


def numbers(part):
    return [round(part[i]["image"][0, 0, 0] / STEP) for i in range(len(part))]


def loaded(source):
    return {split: sources.load(source, split) for split in sources.SPLITS}


# COCO


def test_coco(tmp_path):
    write_own_layout(tmp_path, train=5, validation=3, test=2)
    parts = loaded(f"coco:{tmp_path}")
    assert [numbers(p) for p in parts.values()] == [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1]]
    for part in parts.values():
        assert part.num_classes == 3
        for i in range(len(part)):
            example, count = part[i], 0 if i % 2 else 3
            assert example["image"].shape == (20, 40, 3)
            expected = np.reshape(CORNERS[:count], (-1, 4))
            np.testing.assert_allclose(example["boxes"], expected, atol=1e-6)
            assert example["classes"].tolist() == [1, 2, 0][:count]  # in the order of the ids
            assert example["crowd"].tolist() == [False, True, False][:count]
            assert example["difficult"].tolist() == [False] * count
            types = [example[k].dtype for k in ("boxes", "classes", "crowd", "difficult")]
            assert types == [np.float32, np.int32, bool, bool]


def test_coco_without_validation(tmp_path):
    write_own_layout(tmp_path, train=20, test=2)
    parts = loaded(f"coco:{tmp_path}")
    assert [len(p) for p in parts.values()] == [18, 2, 2]
    assert sorted(numbers(parts["train"]) + numbers(parts["validation"])) == list(range(20))
    for part in parts.values():  # each image kept its boxes
        assert [3 * (n % 2 == 0) for n in numbers(part)] == [len(e["boxes"]) for e in part]


def test_cocos_own_layout(tmp_path):
    """COCO's ``val`` tests; of two years the later one counts."""
    for part, count in (("train2014", 11), ("train2017", 30), ("val2017", 4)):
        name = f"instances_{part}.json"
        write_coco(tmp_path / "annotations" / name, tmp_path / part, count)
    parts = loaded(f"coco:{tmp_path}")
    assert [len(p) for p in parts.values()] == [27, 3, 4]
    assert sorted(numbers(parts["train"]) + numbers(parts["validation"])) == list(range(30))
    assert numbers(parts["test"]) == [0, 1, 2, 3]


def without(content, key):
    return {k: v for k, v in content.items() if k != key}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not an annotation file of COCO \(JSONDecodeError: .*fetch or write it again"),
        ("[1]", r"annotations.json` is not an annotation file of COCO \(TypeError"),
        (json.dumps(without(coco_content(2), "annotations")), r"\(KeyError: 'annotations'\)"),
        (json.dumps(coco_content(2) | {"categories": CATEGORIES[:1]}), r"\(KeyError: 17\)"),
        (json.dumps(coco_content(2) | {"images": []}), r"\(KeyError: 0\)"),
        (
            json.dumps(coco_content(4)),
            r"names 2 images that do not exist, such as /.*2.png; put them",
        ),
    ],
    ids=["no JSON", "list", "no annotations", "no category", "no image", "no file"],
)
def test_broken_coco(tmp_path, text, message):
    write_own_layout(tmp_path, test=2)
    (tmp_path / "test" / "annotations.json").write_text(text)
    with pytest.raises(DiscoError, match=message):
        sources.load(f"coco:{tmp_path}", "test")


def test_missing_coco(tmp_path):
    with pytest.raises(DiscoError, match=r"train/annotations.json` cannot be read \(No such"):
        sources.load(f"coco:{tmp_path}", "train")
    (tmp_path / "annotations").mkdir()
    with pytest.raises(DiscoError, match=r"has no instances_val\*.json; fetch COCO's annotations"):
        sources.load(f"coco:{tmp_path}", "test")


# VOC


def write_voc(root, **lists):
    """Each list has some images, whose numbers count on; each is as grey as its number."""
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    number = 0
    for name, count in lists.items():
        names = [f"{number + i:06d}" for i in range(count)]
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            path = root / "JPEGImages" / f"{name}.jpg"
            write_image(path, number)
            (root / "Annotations" / f"{name}.xml").write_text(annotation())
            number += 1


def annotation(name="dog"):
    """One easy, one difficult object; parts of an object have boxes of their own."""
    return f"""<annotation><size><width>40</width><height>20</height><depth>3</depth></size>
    <object><name>{name}</name><difficult>0</difficult>
      <part><name>head</name><bndbox><xmin>7</xmin><ymin>7</ymin><xmax>9</xmax><ymax>9</ymax>
      </bndbox></part>
      <bndbox><xmin>1</xmin><ymin>6</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object>
    <object><name>aeroplane</name><difficult>1</difficult>
      <bndbox><ymin>11</ymin><xmin>40.5</xmin><ymax>20</ymax><xmax>40.5</xmax></bndbox></object>
    </annotation>"""


def test_voc(tmp_path):
    """Pixels count from 1 and boxes include the last: columns 1 to 10 of 40 are a quarter."""
    write_voc(tmp_path, train=3, val=2, test=4)
    parts = loaded(f"voc:{tmp_path}")
    assert [numbers(p) for p in parts.values()] == [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    assert parts["train"].num_classes == len(set(voc.CLASSES)) == 20
    for example in parts["test"]:
        expected = [[0, 0.25, 0.25, 1], [39.5 / 40, 0.5, 40.5 / 40, 1]]
        np.testing.assert_allclose(example["boxes"], expected, atol=1e-6)
        assert [voc.CLASSES[c] for c in example["classes"]] == ["dog", "aeroplane"]
        assert example["difficult"].tolist() == [False, True]
        assert example["crowd"].tolist() == [False, False]
        assert (example["boxes"].dtype, example["classes"].dtype) == (np.float32, np.int32)


def test_a_year_of_voc_without_test(tmp_path):
    write_voc(tmp_path, train=20, val=3)
    parts = loaded(f"voc:{tmp_path}")
    assert [len(p) for p in parts.values()] == [18, 2, 3]
    assert sorted(numbers(parts["train"]) + numbers(parts["validation"])) == list(range(20))
    assert numbers(parts["test"]) == [20, 21, 22]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", r"000000.xml` is not an annotation of PASCAL VOC \(no element.*fetch"),
        (annotation("giraffe"), r"of PASCAL VOC \('giraffe' is not one of its classes\); fetch it"),
        (annotation().replace("width", "w"), r"of PASCAL VOC \(it has no size/width\)"),
        (annotation().replace(">6<", ">six<"), r"of PASCAL VOC \(could not convert.*'six'"),
        (None, r"of PASCAL VOC \(.*No such file"),
    ],
    ids=["no XML", "no class", "no width", "no number", "no file"],
)
def test_broken_voc(tmp_path, text, message):
    write_voc(tmp_path, test=1)
    path = tmp_path / "Annotations" / "000000.xml"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DiscoError, match=message):
        sources.load(f"voc:{tmp_path}", "test")


def test_missing_voc(tmp_path):
    with pytest.raises(DiscoError, match=r"voc:.*needs the file .*val.txt; name the folder of one"):
        sources.load(f"voc:{tmp_path}", "test")
    write_voc(tmp_path, test=1)
    shutil.rmtree(tmp_path / "JPEGImages")
    with pytest.raises(DiscoError, match=r"000000.jpg cannot be read .*replace or remove"):
        sources.load(f"voc:{tmp_path}", "test")[0]


# TFDS


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Makes TFDS build a set of given features, examples by split."""
    import tensorflow_datasets as tfds

    def build(features, splits):
        class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                image = tfds.features.Tensor(shape=(4, 5, 3), dtype=np.uint8)
                every = tfds.features.FeaturesDict({"image": image, **features(tfds.features)})
                return tfds.core.DatasetInfo(builder=self, features=every, disable_shuffling=True)

            def _split_generators(self, _):
                return {name: enumerate(found) for name, found in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError

        tiny = Tiny(data_dir=str(tmp_path), file_format="array_record")
        tiny.download_and_prepare()
        monkeypatch.setattr(tfds, "builder", lambda name: tiny)

    return build


def objects_features(f):
    flags = {"is_difficult": np.bool_, "is_crowd": np.bool_}
    labels = {"bbox": f.BBoxFeature(), "label": f.ClassLabel(num_classes=7)}
    return {"objects": f.Sequence(labels | flags)}


def objects_example(i, boxes):
    import tensorflow_datasets as tfds

    box = tfds.features.BBox(ymin=0.1, xmin=0.2, ymax=0.5, xmax=0.25 + i / 64)
    found = {"bbox": box, "label": i % 7, "is_difficult": i % 2 == 0, "is_crowd": i % 4 == 0}
    return {"image": np.full((4, 5, 3), STEP * i, np.uint8), "objects": [found] * boxes}


def test_tfds_objects(prepared):
    """The first test image has none, which does not make it one without labels."""
    train = [objects_example(i, i % 3) for i in range(30)]
    test = [objects_example(i, i % 3) for i in range(4)]
    prepared(objects_features, {"train": train, "test": test})
    parts = loaded("tfds_objects:tiny")
    assert [len(p) for p in parts.values()] == [27, 3, 4]
    assert sorted(numbers(parts["train"]) + numbers(parts["validation"])) == list(range(30))
    for part in parts.values():
        assert part.num_classes == 7
        for n, i in enumerate(numbers(part)):
            example, count = part[n], i % 3
            expected = np.tile([0.2, 0.1, 0.25 + i / 64, 0.5], (count, 1))
            np.testing.assert_allclose(example["boxes"], expected, atol=1e-6)
            assert example["classes"].tolist() == [i % 7] * count
            assert example["difficult"].tolist() == [i % 2 == 0] * count
            assert example["crowd"].tolist() == [i % 4 == 0] * count
            types = [example[k].dtype for k in ("boxes", "classes", "crowd", "difficult")]
            assert types == [np.float32, np.int32, bool, bool]
    assert "tensorflow" not in sys.modules


def test_tfds_objects_without_boxes_to_test(prepared):
    """As COCO's: what was published for validation tests."""
    splits = {"train": 20, "validation": 5, "test": 12}
    made = {s: [objects_example(i, s != "test") for i in range(n)] for s, n in splits.items()}
    prepared(objects_features, made)
    parts = loaded("tfds_objects:tiny")
    assert [len(p) for p in parts.values()] == [18, 2, 5]


@pytest.mark.parametrize("key", ["segmentation_mask", "annotation"])
def test_tfds_masks(prepared, key):
    def features(f):
        return {key: f.Tensor(shape=(4, 5, 1), dtype=np.uint8)}

    levels = np.arange(20, dtype=np.uint8).reshape(4, 5, 1) % 4
    examples = [{"image": np.full((4, 5, 3), i, np.uint8), key: levels} for i in range(20)]
    prepared(features, {"train": examples, "validation": examples[:3]})
    parts = loaded("tfds_masks:tiny#3")
    assert [len(p) for p in parts.values()] == [18, 2, 3]
    for part in parts.values():
        assert part.num_classes == 3
        mask = part[1]["mask"]
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, np.array([255, 0, 1, 2])[levels[..., 0]])
    with pytest.raises(DiscoError, match=r"`mask` has class 3, but .*#2\) says that there are 2;"):
        sources.load("tfds_masks:tiny#2", "test")[0]


@pytest.mark.parametrize("name", ["tiny", "tiny#", "tiny#many", "tiny#0"])
def test_tfds_masks_need_the_number_of_classes(name):
    with pytest.raises(DiscoError, match=r"tfds_masks:tiny\) must end with its number of classes"):
        sources.load(f"tfds_masks:{name}", "train")


# Schedules


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (3, 10), (10, 10), (50, 10), (0, 1)])
def test_cosine_is_optax_own(warmup, steps):
    ours = learning_rate(0.3, warmup, steps)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.3, min(warmup, steps - 1), steps)
    at = range(steps + 2)
    np.testing.assert_allclose([ours(i) for i in at], [theirs(i) for i in at], atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("poly", [0, 1, 2, 2 * 0.75**0.9, 2 * 0.5**0.9, 2 * 0.25**0.9, 0, 0]),
        ("constant", [0, 1, 2, 2, 2, 2, 2, 2]),
        ("cosine", [0, 1, 2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0, 0]),
    ],
)
def test_schedules_by_hand(schedule, rates):
    """Two updates of warm-up, four more."""
    found = learning_rate(2.0, 2, 6, schedule)
    np.testing.assert_allclose([found(i) for i in range(8)], rates, atol=1e-6)
    first = learning_rate(2.0, 0, 4, schedule)
    np.testing.assert_allclose([first(i) for i in range(6)], rates[2:], atol=1e-6)
