"""Labelled images from one ``source`` string: embedded digits, IDX files, folders, TFDS.

A source is random access: ``len(source)``, and ``source[i]`` is
``{"image": uint8[h, w, c], "label": int}``.
"""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, UnidentifiedImageError

from disco_jax.errors import DiscoError, require

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.1  # share of the training images used for validation where a set has no such split


class Source(Protocol):
    """Random access to labelled images."""

    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"]
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def subset(self, index: np.ndarray) -> ArraySource:
        return ArraySource(self.images[index], self.labels[index], self.num_classes)


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files, read when asked for."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    num_classes: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": decode(path, str(path)), "label": self.labels[index]}

    def subset(self, index: np.ndarray) -> FileSource:
        return FileSource(
            tuple(self.paths[i] for i in index),
            tuple(self.labels[i] for i in index),
            self.num_classes,
        )


def decode(
    file: Path | BinaryIO, name: str, channels: int = 3
) -> UInt8[np.ndarray, "h w channels"]:
    """The pixels of an image file in colour, or in grey if there is 1 channel.

    Raises:
      DiscoError: if it is missing, damaged, no image, or of absurd size; it has the ``name``.
    """
    try:
        image = np.asarray(Image.open(file).convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no format that Pillow knows" if unknown else " ".join(str(error).split())
        raise DiscoError(
            f"`image` {name} cannot be read ({reason}); replace or remove the file"
        ) from None
    return image.reshape(*image.shape[:2], -1)


def image_files(found: Iterable[Path]) -> list[Path]:
    """Those whose names end as images' do, sorted."""
    suffixes = set(Image.registered_extensions())
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def hold_out(count: int, split: str) -> Int[np.ndarray, "m"]:
    """Indices of ``train`` or ``validation`` among training images: a fixed random tenth."""
    require(
        count >= 10,
        f"`data.source` has {count} training images, but needs at least 10, a tenth of which "
        "validates; add images",
    )
    order = np.random.default_rng(0).permutation(count)
    held = round(count * HELD_OUT)
    return np.sort(order[:held] if split == "validation" else order[held:])


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


class TfdsSource:
    """A TensorFlow Datasets set prepared as array_record; TensorFlow itself is not needed."""

    def __init__(self, name: str, split: str):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(name)
            available = set(builder.info.splits)
            if not available:
                raise FileNotFoundError("it was never prepared")
            if "test" in available and builder.as_data_source(split="test")[0]["label"] < 0:
                available.remove("test")  # published without labels, as ImageNet's
            self._source = builder.as_data_source(split=_tfds_split(available, split))
        except Exception as error:  # TFDS raises a dozen types for "it is not there"
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DiscoError(
                f"`data.source` (=tfds:{name}) split {split!r} is not to be had ({reason}); "
                f"prepare it with `tfds build {name} --file_format=array_record`, and "
                "set TFDS_DATA_DIR if it is not in ~/tensorflow_datasets"
            ) from None
        self.num_classes = int(builder.info.features["label"].num_classes)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._source[index]
        return {"image": np.asarray(example["image"]), "label": int(example["label"])}


def _tfds_split(available: set[str], split: str) -> str:
    """Where a published split is missing, a tenth of the training images validates."""
    published = {"validation", "test"} <= available
    cut = round(100 * (1 - HELD_OUT))
    carved = {"train": f"train[:{cut}%]", "validation": f"train[{cut}%:]"}
    if split == "test":
        return "test" if "test" in available else "validation"
    return split if published else carved[split]


READERS: dict[str, Callable[[str, str], Any]] = {
    "digits": digits,
    "idx": idx,
    "folder": folder,
    "tfds": TfdsSource,
}


def load(source: str, split: str) -> Source:
    """Opens one split of a data set.

    Args:
      source: ``"digits"``, ``"idx:FOLDER"``, ``"folder:ROOT"`` or ``"tfds:NAME"``.
      split: ``"train"``, ``"validation"`` or ``"test"``; no choice may look at the last.

    Raises:
      DiscoError: for an unknown kind or split, or data that is missing or damaged, with the
        package or command that brings it.

    >>> len(load("digits", "train")), load("digits", "test")[0]["image"].shape
    (1293, (8, 8, 1))
    """
    kind, _, name = source.partition(":")
    require(
        kind in READERS and (bool(name) == (kind != "digits")),
        f"`data.source` (={source!r}) must be 'digits', 'idx:FOLDER', 'folder:ROOT' or "
        "'tfds:NAME'; write one of these",
    )
    require(
        split in SPLITS,
        f"`split` (={split!r}) must be one of {', '.join(SPLITS)}; choose one of these",
    )
    return READERS[kind](name, split)
