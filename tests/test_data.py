"""Sources and pipelines: nothing is lost, repeated, or silently replaced."""

import gzip
import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from disco_jax.data import augment, pipeline, sources


def plain(size=8, channels=1, *transforms):
    return pipeline.Preprocess(size, transforms, (0.0,) * channels, (1.0,) * channels)


def test_digits_splits_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    parts = [sources.load("digits", split) for split in sources.SPLITS]
    assert sum(map(len, parts)) == 1797
    images = np.concatenate([p.images for p in parts]).reshape(1797, -1)
    everything = np.round(load_digits().images * (255 / 16)).astype(np.uint8).reshape(1797, -1)
    assert sorted(map(bytes, images)) == sorted(map(bytes, everything))


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_reads_mnist_layout(tmp_path, compressed):
    rng = np.random.default_rng(0)
    kept = {}
    for prefix, count in (("train", 50), ("t10k", 12)):
        images = rng.integers(0, 256, (count, 6, 5), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 7
        kept[prefix] = images, labels
        for array, name in ((images, "images-idx3"), (labels, "labels-idx1")):
            raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
            raw += array.tobytes()
            path = tmp_path / f"{prefix}-{name}-ubyte{'.gz' * compressed}"
            path.write_bytes(gzip.compress(raw) if compressed else raw)
    parts = {s: sources.load(f"idx:{tmp_path}", s) for s in sources.SPLITS}
    assert {s: len(p) for s, p in parts.items()} == {"train": 45, "validation": 5, "test": 12}
    np.testing.assert_array_equal(parts["test"].images[..., 0], kept["t10k"][0])
    assert parts["train"].num_classes == 7
    both = np.concatenate([parts["train"].images, parts["validation"].images])
    assert sorted(map(bytes, both)) == sorted(map(bytes, kept["train"][0]))


def test_folders_of_classes(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                path = tmp_path / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
    parts = {s: sources.load(f"folder:{tmp_path}", s) for s in sources.SPLITS}
    assert {s: len(p) for s, p in parts.items()} == {"train": 20, "validation": 6, "test": 4}
    example = parts["test"][3]
    assert (example["image"].shape, example["label"]) == ((9, 7, 3), 1)


@pytest.mark.parametrize("test_labels", [True, False])
def test_tfds_without_tensorflow(tmp_path, monkeypatch, test_labels):
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(4, 5, 3), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=3),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            splits = {"train": self._generate_examples(30), "test": self._generate_examples(9)}
            if not test_labels:
                splits["validation"] = self._generate_examples(6)
                splits["test"] = ((i, {**x, "label": -1}) for i, x in splits["test"])
            return splits

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": np.full((4, 5, 3), i, np.uint8), "label": i % 3}

    tiny = Tiny(data_dir=str(tmp_path), file_format="array_record")
    tiny.download_and_prepare()
    monkeypatch.setattr(tfds, "builder", lambda name: tiny)
    parts = {s: sources.load("tfds:tiny", s) for s in sources.SPLITS}
    sizes = {"train": 27, "validation": 3, "test": 9 if test_labels else 6}
    assert {s: len(p) for s, p in parts.items()} == sizes
    assert min(parts["test"][i]["label"] for i in range(sizes["test"])) == 0
    assert parts["train"].num_classes == 3
    seen = {int(p[i]["image"][0, 0, 0]) for p in list(parts.values())[:2] for i in range(len(p))}
    assert seen == set(range(30))
    assert "tensorflow" not in sys.modules


def test_training_batches_continue_exactly():
    source = sources.load("digits", "train")
    batches = pipeline.training_batches(source, plain(8, 1, "random_crop"), 64, seed=3)
    for _ in range(25):  # into the second epoch
        next(batches)
    position, expected = batches.get_state(), [next(batches) for _ in range(3)]
    again = pipeline.training_batches(source, plain(8, 1, "random_crop"), 64, seed=3)
    again.set_state(position)
    for batch in expected:
        got = next(again)
        np.testing.assert_array_equal(got["image"], batch["image"])
        np.testing.assert_array_equal(got["label"], batch["label"])


def test_epochs_have_their_own_order_and_miss_nothing():
    source = sources.ArraySource(
        np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1), np.arange(60), 60
    )
    batches = pipeline.training_batches(source, plain(1), 20, seed=0)
    epochs = [np.concatenate([next(batches)["label"] for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(60))
    assert not np.array_equal(*epochs)


def test_evaluation_sees_every_image_once():
    source = sources.load("digits", "test")
    batches = list(pipeline.evaluation_batches(source, plain(), 100))
    assert [b["weight"].sum() for b in batches] == [100, 100, 100, 60]
    labels = np.concatenate([b["label"][b["weight"] > 0] for b in batches])
    np.testing.assert_array_equal(labels, source.labels)


@pytest.mark.parametrize("name", augment.TRANSFORMS)
@given(st.integers(9, 40), st.integers(9, 40), st.sampled_from([1, 3]), st.integers(0, 9))
def test_transforms_keep_their_word(name, height, width, channels, seed):
    """uint8 in and out, the size asked for, repeatable by the generator, input untouched."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    before = image.copy()
    got = augment.TRANSFORMS[name](image, 16, np.random.default_rng(seed))
    again = augment.TRANSFORMS[name](image, 16, np.random.default_rng(seed))
    np.testing.assert_array_equal(got, again)
    np.testing.assert_array_equal(image, before)
    assert got.dtype == np.uint8
    if name not in ("flip", "rgb"):
        assert got.shape == (16, 16, channels)
    if name == "rgb":
        assert got.shape == (height, width, 3)


def test_normalisation():
    image = np.full((2, 2, 1), 255, np.uint8)
    preprocess = pipeline.Preprocess(2, (), (0.5,), (0.25,))
    got = preprocess({"image": image, "label": 1}, np.random.default_rng(0))
    np.testing.assert_array_equal(got["image"], np.full((2, 2, 1), 2.0, np.float32))
