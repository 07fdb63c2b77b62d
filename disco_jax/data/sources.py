"""Examples from one ``source`` string: embedded ones, files and folders, TFDS.

A source is random access: ``len(source)``, and ``source[i]`` is an example. Classification has
``{"image": uint8[h, w, c], "label": int}``; see ``scenes``, ``coco``, ``masks`` and ``photos`` for
the other tasks.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from disco_jax.data import coco, masks, photos, scenes, tfds, voc
from disco_jax.data.images import (
    SPLITS,
    ArraySource,
    FileSource,
    Source,
    hold_out,
    image_files,
)
from disco_jax.errors import DiscoError, require


def digits(_: str, split: str) -> ArraySource:
    """The 1,797 handwritten 8x8 digits inside scikit-learn; the last fifth is the test split."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    every = ArraySource(images, found.target.astype(np.int64), 10)
    first_test = len(every) * 4 // 5
    if split == "test":
        return every.subset(np.arange(first_test, len(every)))
    return every.subset(hold_out(first_test, split))


def idx(folder: str, split: str) -> ArraySource:
    """A folder with the four IDX files of MNIST's layout, gzipped or not."""
    prefix = "t10k" if split == "test" else "train"
    images = read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte"))
    require(
        images.ndim == 3 and labels.shape == images.shape[:1] and len(labels) > 0,
        f"`idx:{folder}` has {prefix} images of shape {images.shape} and labels of shape "
        f"{labels.shape}, but must have [n, h, w] and [n]; replace the files",
    )
    every = ArraySource(images[..., None], labels.astype(np.int64), int(labels.max()) + 1)
    return every if split == "test" else every.subset(hold_out(len(every), split))


def _idx_file(folder: str, name: str) -> Path:
    for path in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if path.is_file():
            return path
    raise DiscoError(
        f"`data.source` (=idx:{folder}) needs the file {name}[.gz] there, which does not exist; "
        "for Fashion-MNIST install the Debian package dataset-fashion-mnist and use "
        "idx:/usr/share/datasets/fashion-mnist, or name the folder that holds the IDX files"
    )


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """Reads one IDX file of unsigned bytes.

    Raises:
      DiscoError: if the file is truncated, or is not IDX.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DiscoError(f"`{path}` is truncated or damaged ({error}); fetch it again") from None
    require(
        len(raw) >= 4 and raw[:3] == b"\x00\x00\x08" and raw[3] > 0,
        f"`{path}` starts with bytes {raw[:4].hex()!r}, but an IDX file of bytes starts with "
        "000008; name an IDX file",
    )
    rank = raw[3]
    require(
        len(raw) >= 4 + 4 * rank,
        f"`{path}` ends within its header ({len(raw)} of {4 + 4 * rank} bytes); the file is "
        "truncated or damaged, fetch it again",
    )
    shape = tuple(np.frombuffer(raw, ">i4", count=rank, offset=4).tolist())
    needed = 4 + 4 * rank + int(np.prod(shape))
    require(
        len(raw) == needed,
        f"`{path}` holds {len(raw)} bytes, but its header says shape {shape}, which takes {needed}"
        "; the file is truncated or damaged, fetch it again",
    )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def folder(root: str, split: str) -> FileSource:
    """``ROOT/train/CLASS/*``, and ``validation`` (or ``val``) and ``test`` beside ``train``.

    Without ``test`` the validation folder is the test split and a tenth of ``train`` validates;
    without any the same holds for that tenth alone, and asking for ``test`` is an error.
    """
    train = Path(root) / "train"
    require(
        train.is_dir(),
        f"`data.source` (=folder:{root}) needs the folder {train} with one folder for each class; "
        "create it or name another root",
    )
    validation = next((p for n in ("validation", "val") if (p := Path(root) / n).is_dir()), None)
    test = Path(root) / "test" if (Path(root) / "test").is_dir() else None
    classes = sorted(p.name for p in train.iterdir() if p.is_dir())
    require(bool(classes), f"`{train}` has no class folders; put each class in a folder there")
    if split == "test":
        found = test or validation
        require(
            found is not None,
            f"`data.source` (=folder:{root}) has no test images; add {root}/test or {root}/val",
        )
        assert found is not None
        return _class_folders(found, classes)
    if test is not None and validation is not None:
        return _class_folders(train if split == "train" else validation, classes)
    every = _class_folders(train, classes)
    return every.subset(hold_out(len(every), split))


def _class_folders(root: Path, classes: list[str]) -> FileSource:
    unknown = sorted({p.name for p in root.iterdir() if p.is_dir()} - set(classes))
    require(
        not unknown,
        f"`{root}` has class folders {unknown} that the train folder lacks; the splits must have "
        "the same classes",
    )
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in image_files((root / name).rglob("*"))
    ]
    require(bool(found), f"`{root}` holds no images; put them in {root}/CLASS/")
    paths, labels = zip(*found, strict=True)
    return FileSource(paths, labels, len(classes))


READERS: dict[str, Callable[[str, str], Any]] = {
    "digits": digits,
    "idx": idx,
    "folder": folder,
    "tfds": tfds.Labelled,
    "scenes": scenes.scenes,
    "coco": coco.coco,
    "voc": voc.voc,
    "tfds_objects": tfds.Objects,
    "segments": scenes.segments,
    "masks": masks.masks,
    "tfds_masks": tfds.Masks,
    "samples": photos.samples,
    "photos": photos.photos,
    "tfds_photos": tfds.Photos,
}
EMBEDDED = ("digits", "scenes", "segments", "samples")  # need no name


def load(source: str, split: str) -> Source:
    """Opens one split of a data set.

    Args:
      source: a kind and a name, ``"folder:ROOT"`` say. Classification: ``"digits"``,
        ``"idx:FOLDER"``, ``"folder:ROOT"``, ``"tfds:NAME"``. Detection: ``"scenes"``,
        ``"coco:ROOT"``, ``"voc:ROOT"``, ``"tfds_objects:NAME"``. Segmentation: ``"segments"``,
        ``"masks:ROOT"``, ``"tfds_masks:NAME#CLASSES"``.
        Super-resolution: ``"samples"``, ``"photos:ROOT"``, ``"tfds_photos:NAME"``.
      split: ``"train"``, ``"validation"`` or ``"test"``; no choice may look at the last.

    Raises:
      DiscoError: for an unknown kind or split, or data that is missing or damaged, with the
        package or command that brings it.

    >>> len(load("digits", "train")), load("digits", "test")[0]["image"].shape
    (1293, (8, 8, 1))
    """
    kind, _, name = source.partition(":")
    require(
        kind in READERS and (bool(name) != (kind in EMBEDDED)),
        f"`data.source` (={source!r}) must be {', '.join(EMBEDDED)}, or KIND:NAME with a kind of "
        f"{', '.join(k for k in READERS if k not in EMBEDDED)}; write one of these",
    )
    require(
        split in SPLITS,
        f"`split` (={split!r}) must be one of {', '.join(SPLITS)}; choose one of these",
    )
    return READERS[kind](name, split)
