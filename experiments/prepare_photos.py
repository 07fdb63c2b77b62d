"""The photographs of ``prepare_data.py``: which they are, their split, and the set ``photos``.

Written are ``{train,validation,test}/NAME.png``. The sources are JPEG files, so each is reduced two
times or more, which leaves little of the compression. Validation and test are one crop each, of a
size that 2, 3 and 4 divide, where a photograph has most detail: the middle of many is sky or blur.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps
from rich.progress import track

from disco_jax.errors import require

Item = TypeVar("Item")

LONGEST = 1500  # pixels of a reduced photograph's longer side
CROP = (384, 252)  # width and height of what validates and tests
SHARES = (0.1, 0.2)  # of the photographs for validation and test
# Two pictures are one if their 16x16 thumbnails differ by less, of 255: copies in other sizes come
# to 3 at most, different photographs to 18 at least.
SAME = 8.0
# JPEG files that are no photographs, by file or by Plasma's folder. Every PNG file there is drawn.
DRAWN = {
    "Autumn",
    "Flow",
    "GreenTraditional",
    "Honeywave",
    "PastelHills",
    "SafeLanding",
    "Shell",
    "Volna",
    "umang_by_Abhishek_Mudgal",
}


def title(path: Path) -> str:
    """Plasma calls files by their size, in ``TITLE/contents/images``; others by what they show."""
    return path.parts[path.parts.index("contents") - 1] if "contents" in path.parts else path.stem


def photographs(files: Iterable[Path]) -> dict[str, Path]:
    """Photographs by title: the largest of each, large enough for a crop once halved."""
    found = {}
    for path in files:
        if path.suffix == ".jpg" and not path.is_symlink() and title(path) not in DRAWN:
            width, height = Image.open(path).size
            if width >= 2 * CROP[0] and height >= 2 * CROP[1]:
                found[path] = width * height
    kept: dict[Path, Float[np.ndarray, "16 16 3"]] = {}
    for path in sorted(found, key=lambda p: (-found[p], p)):
        seen = thumbnail(path)
        if all(np.abs(seen - other).mean() >= SAME for other in kept.values()):
            kept[path] = seen
    return dict(sorted((title(path), path) for path in kept))


def thumbnail(path: Path) -> Float[np.ndarray, "16 16 3"]:
    with Image.open(path) as image:
        image.draft("RGB", (64, 64))  # decodes at an eighth of the size
        return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), float)


def split(items: Sequence[Item], rng: np.random.Generator) -> dict[str, list[Item]]:
    """Every item in one of ``train``, ``validation`` and ``test``, each of which has some."""
    require(
        len(items) >= 3,
        f"`items` are {len(items)} stamps or photographs, but must be at least 3, one for each "
        "split; install their packages anew",
    )
    counts = [max(1, round(share * len(items))) for share in SHARES]
    parts = np.split(rng.permutation(len(items)), np.cumsum(counts))
    names = ("validation", "test", "train")
    return {n: [items[i] for i in np.sort(part)] for n, part in zip(names, parts, strict=True)}


def reduced(path: Path, longest: int = LONGEST) -> Image.Image:
    """At most half the size and ``longest`` pixels on the longer side, antialiased."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = min(0.5, longest / max(image.size))
    width, height = (round(side * scale) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def detailed_crop(image: Image.Image) -> Image.Image:
    """Of the crops half a crop apart, the one in which neighbouring pixels differ most."""
    grey = np.asarray(image.convert("L"), float)
    width, height = CROP
    corners = [
        (top, left)
        for top in range(0, image.height - height + 1, height // 2)
        for left in range(0, image.width - width + 1, width // 2)
    ]
    edges = np.abs(np.diff(grey, axis=1))
    top, left = max(corners, key=lambda c: edges[c[0] : c[0] + height, c[1] : c[1] + width].mean())
    return image.crop((left, top, left + width, top + height))


def build(folder: Path, files: Iterable[Path], seed: int) -> list[Path]:
    """Writes the set into ``folder``; returns the files that it was made of."""
    found = photographs(files)
    parts = split(list(found), np.random.default_rng(seed))
    for name, titles in parts.items():
        (folder / name).mkdir()
        for each in track(titles, f"photos/{name}"):
            image = reduced(found[each])
            image = image if name == "train" else detailed_crop(image)
            image.save(folder / name / f"{each}.png")
    return list(found.values())
