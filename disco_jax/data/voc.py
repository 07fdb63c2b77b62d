"""PASCAL VOC's folders: boxes in XML."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from disco_jax.data.coco import BoxSource, Objects
from disco_jax.data.images import hold_out
from disco_jax.errors import DiscoError, require

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
LISTS = {"train": "train", "validation": "val", "test": "test"}


def voc(root: str, split: str) -> BoxSource:
    """``ROOT/{Annotations,JPEGImages,ImageSets/Main}``, as in ``VOCdevkit/VOC2007``.

    A set without ``test.txt``, as VOC 2012, is tested on ``val``; a tenth of ``train`` validates.
    """
    lists = Path(root) / "ImageSets" / "Main"
    tested = (lists / "test.txt").is_file()
    carved = split != "test" and not tested
    name = LISTS[split] if tested else ("val" if split == "test" else "train")
    path = lists / f"{name}.txt"
    require(
        path.is_file(),
        f"`data.source` (=voc:{root}) needs the file {path}; name the folder of one year, such as "
        "VOCdevkit/VOC2007",
    )
    names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    found = BoxSource(
        tuple(Path(root) / "JPEGImages" / f"{name}.jpg" for name in names),
        tuple(read(Path(root) / "Annotations" / f"{name}.xml") for name in names),
        len(CLASSES),
    )
    return found.subset(hold_out(len(found), split)) if carved else found


def read(path: Path) -> Objects:
    """The objects of one XML file; VOC counts pixels from 1 and includes the last.

    Raises:
      DiscoError: if it is missing, is no annotation of VOC, or has a class that VOC lacks.
    """
    try:
        tree = ElementTree.parse(path).getroot()
        sides = [float(_text(tree, f"size/{side}")) for side in ("width", "height")] * 2
        found = [
            (
                [
                    float(_text(o, f"bndbox/{corner}")) - (corner in ("xmin", "ymin"))
                    for corner in ("xmin", "ymin", "xmax", "ymax")
                ],
                _label(_text(o, "name")),
                o.findtext("difficult") == "1",
            )
            for o in tree.findall("object")
        ]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DiscoError(
            f"`{path}` is not an annotation of PASCAL VOC ({error}); fetch it again"
        ) from None
    boxes = np.asarray([box for box, _, _ in found], np.float32).reshape(-1, 4)
    return Objects(
        boxes / np.asarray(sides, np.float32),
        np.asarray([label for _, label, _ in found], np.int32),
        np.asarray([difficult for _, _, difficult in found], bool),
        np.zeros(len(found), bool),
    )


def _label(name: str) -> int:
    if name not in CLASSES:
        raise ValueError(f"{name!r} is not one of its classes")
    return CLASSES.index(name)


def _text(element: ElementTree.Element, name: str) -> str:
    found = element.findtext(name)
    if found is None:
        raise ValueError(f"it has no {name}")
    return found.strip()
