"""The set ``land`` of ``prepare_data.py``: what grows where, seen from space.

Tiles of NASA's Blue Marble with the classes of the MODIS land cover map of 2019 (MCD12C1, IGBP).
Written are ``{train,validation,test}/images/xLEFT_yTOP.png``, ``masks/`` beside them with class ids
as grey values (255 is to be ignored), and ``classes.txt``. Longitude decides on the split: bands of
17 degrees are dealt out in turn, in the order that leaves no class under 3.8 % of a split's pixels
and the classes' shares about as alike as any. Training tiles overlap by half, within their bands;
no other tiles overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from rich.progress import track

from disco_jax.errors import require

# IGBP's classes, merged where they are alike. Wetlands (11) and towns (13) are 0.6 and 0.3 % of the
# land, too little to learn, and like nothing else: they are ignored, as are pixels without data.
CLASSES = {
    "water": (0,),
    "forest": (1, 2, 3, 4, 5),
    "shrubland": (6, 7),
    "savanna": (8, 9),
    "grassland": (10,),
    "cropland": (12, 14),
    "snow and ice": (15,),
    "barren": (16,),
}
IGNORED = 255
TILE = 128  # pixels of 1/15 degree
BAND = 256  # pixels of longitude
BANDS = ("validation", "train", "test", "train", "train")  # from the date line eastwards, repeated
STRIDES = {"train": TILE // 2, "validation": TILE, "test": TILE}
MIN_LAND = 0.2


def merged(cover: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """IGBP's classes to ours."""
    table = np.full(256, IGNORED, np.uint8)
    for new, (_, old) in enumerate(CLASSES.items()):
        table[list(old)] = new
    return table[cover]


def corners(land: Bool[np.ndarray, "h w"], split: str) -> Iterator[tuple[int, int]]:
    """(left, top) of a split's tiles: within its bands, and more than a fifth of them land."""
    height, width = land.shape
    own = np.array([BANDS[x // BAND % len(BANDS)] == split for x in range(width)])
    stride = STRIDES[split]
    for left in range(0, width - TILE + 1, stride):
        for top in range(0, height - TILE + 1, stride):
            inside = own[left : left + TILE].all()
            if inside and land[top : top + TILE, left : left + TILE].mean() > MIN_LAND:
                yield left, top


def build(folder: Path, picture: Path, cover_map: Path) -> list[Path]:
    """Writes the set into ``folder``; returns the files that it was made of."""
    globe = Image.open(picture).convert("RGB")
    cover = Image.open(cover_map).resize(globe.size, Image.Resampling.NEAREST)
    mask = Image.fromarray(merged(np.asarray(cover)))
    land = (np.asarray(cover) >= 1) & (np.asarray(cover) <= 16)
    for name in STRIDES:
        found = list(corners(land, name))
        require(
            bool(found),
            f"`{name}` has no tile with over {MIN_LAND:.0%} land on a globe of {globe.size} "
            f"pixels, which must be wider than {len(BANDS) * BAND}; install the packages anew",
        )
        for kind in ("images", "masks"):
            (folder / name / kind).mkdir(parents=True)
        for left, top in track(found, f"land/{name}"):
            file, box = f"x{left:04d}_y{top:04d}.png", (left, top, left + TILE, top + TILE)
            globe.crop(box).save(folder / name / "images" / file)
            mask.crop(box).save(folder / name / "masks" / file)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return [picture, cover_map]
