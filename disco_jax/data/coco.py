"""Detection sets whose boxes are in COCO's JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from disco_jax.data.images import decode, hold_out
from disco_jax.errors import DiscoError, require


@dataclasses.dataclass(frozen=True)
class Objects:
    """What is to be found in one image: corners as shares of its sides, classes from 0.

    What is difficult (VOC) or a crowd (COCO) need not be found.
    """

    boxes: Float[np.ndarray, "m 4"]
    classes: Int[np.ndarray, "m"]
    difficult: Bool[np.ndarray, "m"]
    crowd: Bool[np.ndarray, "m"]


@dataclasses.dataclass(frozen=True)
class BoxSource:
    """``{"image": uint8[h, w, 3], ...}`` with what :class:`Objects` has; images read when asked."""

    paths: tuple[Path, ...]
    objects: tuple[Objects, ...]
    num_classes: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": decode(path, str(path)), **vars(self.objects[index])}

    def subset(self, index: np.ndarray) -> BoxSource:
        paths, objects = (tuple(x[i] for i in index) for x in (self.paths, self.objects))
        return BoxSource(paths, objects, self.num_classes)


def coco(root: str, split: str) -> BoxSource:
    """``ROOT/SPLIT/annotations.json`` and ``ROOT/SPLIT/images/``, or COCO's own folders.

    COCO's are ``ROOT/annotations/instances_train2017.json`` and ``ROOT/train2017/``, the year as it
    is there; its ``val`` is the test split then, for COCO's test has no boxes. Without a validation
    split a tenth of ``train`` validates.
    """
    if not (Path(root) / "annotations").is_dir():
        carved = split != "test" and not (Path(root) / "validation").is_dir()
        folder = Path(root) / ("train" if carved else split)
        found = read(folder / "annotations.json", folder / "images")
    else:
        carved, part = split != "test", "val" if split == "test" else "train"
        files = sorted((Path(root) / "annotations").glob(f"instances_{part}*.json"))
        require(
            bool(files),
            f"`{root}/annotations` has no instances_{part}*.json; fetch COCO's annotations",
        )
        found = read(files[-1], Path(root) / files[-1].stem.removeprefix("instances_"))
    return found.subset(hold_out(len(found), split)) if carved else found


def read(path: Path, images: Path) -> BoxSource:
    """The images of one annotation file.

    Raises:
      DiscoError: if the file is missing, is not COCO's JSON, or names images that do not exist.
    """
    try:
        content = json.loads(path.read_text())
        numbers = sorted(c["id"] for c in content["categories"])
        order = {number: place for place, number in enumerate(numbers)}
        found: dict[int, list[Mapping[str, Any]]] = {i["id"]: [] for i in content["images"]}
        for annotation in content["annotations"]:
            found[annotation["image_id"]].append(annotation)
        every = sorted(content["images"], key=lambda i: i["id"])
        objects = tuple(_objects(found[i["id"]], i["width"], i["height"], order) for i in every)
        paths = tuple(images / i["file_name"] for i in every)
    except OSError as error:
        raise DiscoError(f"`{path}` cannot be read ({error.strerror}); name COCO's JSON") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DiscoError(
            f"`{path}` is not an annotation file of COCO ({type(error).__name__}: {error}); fetch "
            "or write it again"
        ) from None
    missing = [p for p in paths if not p.is_file()]
    require(
        not missing,
        f"`{path}` names {len(missing)} images that do not exist, such as "
        f"{', '.join(map(str, missing[:1]))}; put them there",
    )
    return BoxSource(paths, objects, len(numbers))


def _objects(
    annotations: list[Mapping[str, Any]], width: int, height: int, order: Mapping[int, int]
) -> Objects:
    boxes = np.asarray([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    return Objects(
        corners / np.asarray([width, height] * 2, np.float32),
        np.asarray([order[a["category_id"]] for a in annotations], np.int32),
        np.zeros(len(annotations), bool),
        np.asarray([bool(a.get("iscrowd", 0)) for a in annotations], bool),
    )
