"""TensorFlow Datasets prepared as array_record; TensorFlow itself is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from disco_jax.data.images import HELD_OUT
from disco_jax.errors import DiscoError, require

SEEN = 10  # examples of a test split that tell whether it has labels: one may have no objects


class Prepared:
    """One split of a set that ``tfds build`` has prepared; subclasses say what an example is."""

    kind = ""

    def __init__(self, name: str, split: str):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(name)
            available = set(builder.info.splits)
            if not available:
                raise FileNotFoundError("it was never prepared")
            if "test" in available:
                tests = builder.as_data_source(split="test")
                if not any(self.labelled(tests[i]) for i in range(min(SEEN, len(tests)))):
                    available.remove("test")  # published without labels, as ImageNet's
            self._source = builder.as_data_source(split=_split(available, split))
            self.num_classes = self.classes(builder.info.features)
        except Exception as error:  # TFDS raises a dozen types for "it is not there"
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DiscoError(
                f"`data.source` (={self.kind}:{name}) split {split!r} is not to be had ({reason}); "
                f"prepare it with `tfds build {name} --file_format=array_record`, and "
                "set TFDS_DATA_DIR if it is not in ~/tensorflow_datasets"
            ) from None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self._source[index])

    def labelled(self, example: Mapping[str, Any]) -> bool:
        return True

    def classes(self, features: Any) -> int:
        return 0

    def read(self, example: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class Labelled(Prepared):
    """A class for each image: features ``image`` and ``label``."""

    kind = "tfds"

    def labelled(self, example: Mapping[str, Any]) -> bool:
        return example["label"] >= 0

    def classes(self, features: Any) -> int:
        return int(features["label"].num_classes)

    def read(self, example: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": np.asarray(example["image"]), "label": int(example["label"])}


class Objects(Prepared):
    """Boxes, as in ``voc/2007`` and ``coco/2017``: ``image`` and ``objects`` (bbox, label)."""

    kind = "tfds_objects"

    def labelled(self, example: Mapping[str, Any]) -> bool:
        return len(example["objects"]["label"]) > 0

    def classes(self, features: Any) -> int:
        return int(features["objects"]["label"].num_classes)

    def read(self, example: Mapping[str, Any]) -> dict[str, Any]:
        objects = example["objects"]
        rows = np.reshape(np.asarray(objects["bbox"], np.float32), (-1, 4))
        none = np.zeros(len(rows), bool)
        return {
            "image": np.asarray(example["image"]),
            "boxes": rows[:, [1, 0, 3, 2]],  # TFDS has y before x
            "classes": np.asarray(objects["label"], np.int32),
            "difficult": np.asarray(objects.get("is_difficult", none), bool),
            "crowd": np.asarray(objects.get("is_crowd", none), bool),
        }


class Masks(Prepared):
    """A class for each pixel, counted from 1; 0 is no class, and counts nowhere.

    ``NAME#CLASSES`` says how many there are, which TFDS does not: ``oxford_iiit_pet#3`` has its
    masks in ``segmentation_mask``, ``scene_parse150#150`` (ADE20K) in ``annotation``.
    """

    kind = "tfds_masks"

    def __init__(self, name: str, split: str):
        name, _, count = name.partition("#")
        require(
            count.isdigit() and int(count) > 0,
            f"`data.source` (=tfds_masks:{name}) must end with its number of classes; write "
            "tfds_masks:oxford_iiit_pet#3, say",
        )
        super().__init__(name, split)
        self.num_classes = int(count)

    def read(self, example: Mapping[str, Any]) -> dict[str, Any]:
        mask = np.asarray(example.get("segmentation_mask", example.get("annotation")))
        mask = mask.astype(np.int32)[..., 0] - 1
        require(
            mask.max(initial=0) < self.num_classes,
            f"`mask` has class {mask.max(initial=0) + 1}, but `data.source` (=tfds_masks:...#"
            f"{self.num_classes}) says that there are {self.num_classes}; correct the number",
        )
        return {
            "image": np.asarray(example["image"]),
            "mask": np.where(mask < 0, 255, mask).astype(np.uint8),
        }


class Photos(Prepared):
    """Photographs in full resolution, as ``hr`` of ``div2k/bicubic_x2``."""

    kind = "tfds_photos"

    def read(self, example: Mapping[str, Any]) -> dict[str, Any]:
        return {"target": np.asarray(example["hr"])}


def _split(available: set[str], split: str) -> str:
    """Where a published split is missing, a tenth of the training images validates."""
    published = {"validation", "test"} <= available
    cut = round(100 * (1 - HELD_OUT))
    carved = {"train": f"train[:{cut}%]", "validation": f"train[{cut}%:]"}
    if split == "test":
        return "test" if "test" in available else "validation"
    return split if published else carved[split]
