"""The set ``scenes`` of ``prepare_data.py``: cut-outs pasted on photographs, with exact boxes.

Written are ``{train,validation,test}/images/000000.jpg`` and ``annotations.json`` in COCO's format;
each image also says its ``photograph`` and each annotation its ``stamp``. No stamp and no
photograph is in two splits. Boxes are tight around the pixels where a stamp hides more than half of
what is behind it and no later stamp hides it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from prepare_photos import photographs, reduced, split
from rich.progress import track

from disco_jax.errors import require

Rgba = UInt8[np.ndarray, "h w 4"]
Titled = Sequence[tuple[str, Image.Image]]

# The folders of Tux Paint that hold at least 18 PNG stamps of one kind of thing. Left out are
# symbols, and the household and the seasons, whose things have no look in common.
CLASSES = {
    "bird": "animals/birds",
    "clothes": "clothes",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "house": "town/houses",
    "insect": "animals/insects",
    "mammal": "animals/mammals",
    "road sign": "town/roadsigns",
    "vegetable": "food/vegetables",
    "vehicle": "vehicles",
}
# Photographs of things of these classes, which would have no boxes.
SHOWN = {
    "Dragonfly_by_Bolly",
    "Elephants_5640x3172",
    "EveningGlow",
    "FreshFlower",
    "Garden",
    "LadyBird",
    "Picture_0B_by_freespace",
    "TwoWings",
    "YellowFlower",
    "free_by_Peter_Nerlich",
    "friends_by_Aitzol_Berasategi",
    "seeding_by_Clements_Engelhardt",
}
SIZES = (0.2, 0.6)  # of a stamp's longer side, as a share of the scene's
MOST = 5  # stamps in a scene
TRIES = 20  # places tried for a stamp
MIN_AREA = 16  # pixels; of less than that nothing can be seen


def stamps_of(files: Iterable[Path]) -> dict[str, list[Path]]:
    """PNG stamps by class, without those that mirror another."""
    found = sorted(f for f in files if f.suffix == ".png" and not f.stem.endswith("_mirror"))
    return {
        name: [f for f in found if f"/stamps/{place}/" in f.as_posix()]
        for name, place in CLASSES.items()
    }


def stamp_title(path: Path) -> str:
    return path.with_suffix("").as_posix().rpartition("/stamps/")[2]


def cut_out(path: Path) -> Image.Image:
    """The stamp without its transparent border."""
    image = Image.open(path).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox())


def smaller(image: Image.Image, size: int) -> Image.Image:
    """A photograph of about twice a scene's size: enough to zoom into, and quick to cut from."""
    require(
        32 <= size <= min(image.size),
        f"`--scene-size` (={size}) must be from 32 to {min(image.size)} pixels, the shorter side "
        "of a photograph; choose one between",
    )
    scale = min(1.0, 2 * size / min(image.size))
    width, height = (round(side * scale) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def backdrop(
    photograph: Image.Image, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """A random square of a photograph, flipped in half of the cases."""
    side = int(rng.integers(size, min(photograph.size) + 1))
    left, top = (int(rng.integers(have - side + 1)) for have in photograph.size)
    box = (left, top, left + side, top + side)
    image = np.asarray(photograph.resize((size, size), Image.Resampling.BILINEAR, box))
    return image[:, ::-1] if rng.random() < 0.5 else image


def varied(stamp: Image.Image, size: int, rng: np.random.Generator) -> Rgba:
    """The stamp in a random size, flipped in half of the cases."""
    scale = size * rng.uniform(*SIZES) / max(stamp.size)
    width, height = (max(1, round(side * scale)) for side in stamp.size)
    image = np.asarray(stamp.resize((width, height), Image.Resampling.LANCZOS))
    return image[:, ::-1] if rng.random() < 0.5 else image


def compose(
    image: UInt8[np.ndarray, "h w 3"], stamps: Sequence[Rgba], rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "h w 3"], Int[np.ndarray, "h w"]]:
    """Pastes stamps at random places, later ones over earlier ones.

    Of every stamp pasted at least half stays to be seen; one that finds no such place is left out.

    Returns:
      The scene, and for each pixel the index of the stamp seen there, or -1.
    """
    image, owner = image.copy(), np.full(image.shape[:2], -1)
    areas = np.zeros(len(stamps), int)  # 0 for what is not pasted
    for index, stamp in enumerate(stamps):
        opaque = stamp[..., 3] > 127
        if opaque.sum() < MIN_AREA:
            continue
        for _ in range(TRIES):
            top, left = rng.integers(np.subtract(owner.shape, opaque.shape) + 1)
            window = np.s_[top : top + len(opaque), left : left + opaque.shape[1]]
            after = owner.copy()
            after[window][opaque] = index
            seen = np.bincount(after[after >= 0], minlength=len(stamps))
            if (2 * seen >= areas).all():
                owner, areas[index] = after, opaque.sum()
                image[window] = over(stamp, image[window])
                break
    return image, owner


def over(stamp: Rgba, behind: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    alpha = stamp[..., 3:].astype(int)
    return ((stamp[..., :3] * alpha + behind * (255 - alpha) + 127) // 255).astype(np.uint8)


def box_of(seen: Bool[np.ndarray, "h w"]) -> list[int]:
    """[left, top, width, height] of the pixels that are true."""
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def annotations_of(
    owner: Int[np.ndarray, "h w"], stamps: Sequence[tuple[int, str]]
) -> list[dict[str, Any]]:
    """Of a scene's stamps, given by class and title, those that are pasted, in COCO's terms."""
    return [
        {
            "category_id": stamps[index][0] + 1,
            "bbox": box_of(owner == index),
            "area": int((owner == index).sum()),
            "iscrowd": 0,
            "stamp": stamps[index][1],
        }
        for index in np.unique(owner[owner >= 0])
    ]


def write(
    folder: Path,
    count: int,
    size: int,
    stamps: Sequence[Titled],
    photos: Titled,
    rng: np.random.Generator,
) -> None:
    """One split: ``count`` scenes of ``size`` pixels, from the stamps of each class."""
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in track(range(count), f"scenes/{folder.name}"):
        behind, photo = photos[rng.integers(len(photos))]
        chosen, pasted = [], []
        for category in rng.integers(len(stamps), size=rng.integers(1, MOST + 1)):
            name, stamp = stamps[category][rng.integers(len(stamps[category]))]
            chosen.append((int(category), name))
            pasted.append(varied(stamp, size, rng))
        scene, owner = compose(backdrop(photo, size, rng), pasted, rng)
        file = f"{number:06d}.jpg"
        Image.fromarray(scene).save(folder / "images" / file, quality=95)
        image = {"id": number + 1, "file_name": file, "width": size, "height": size}
        images.append({**image, "photograph": behind})
        for annotation in annotations_of(owner, chosen):
            ids = {"id": len(annotations) + 1, "image_id": number + 1}
            annotations.append({**ids, **annotation})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def build(
    folder: Path,
    stamp_files: Iterable[Path],
    photo_files: Iterable[Path],
    counts: dict[str, int],
    size: int,
    seed: int,
) -> list[Path]:
    """Writes the set into ``folder``; returns the files that it was made of."""
    rng = np.random.default_rng(seed)
    stamps = stamps_of(stamp_files)
    behind = {n: p for n, p in photographs(photo_files).items() if n not in SHOWN}
    pictures = [(name, smaller(reduced(path), size)) for name, path in behind.items()]
    photo_splits = split(pictures, rng)
    stamp_splits = [split(paths, rng) for paths in stamps.values()]
    for (name, count), own in zip(counts.items(), rng.spawn(len(counts)), strict=True):
        cut = [[(stamp_title(p), cut_out(p)) for p in parts[name]] for parts in stamp_splits]
        write(folder / name, count, size, cut, photo_splits[name], own)
    return [*itertools.chain(*stamps.values()), *behind.values()]
