"""Segmentation sets in folders: images, and beside them masks of the same names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from disco_jax.data.images import decode, hold_out, image_files
from disco_jax.errors import DiscoError, require

CLASSES = "classes.txt"


@dataclasses.dataclass(frozen=True)
class MaskSource:
    """``{"image": uint8[h, w, 3], "mask": uint8[h, w]}``; 255 in a mask counts nowhere."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    num_classes: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = decode(self.images[index], str(self.images[index]))
        mask = self._mask(self.masks[index])
        require(
            mask.shape == image.shape[:2],
            f"`mask` {self.masks[index]} has {mask.shape} pixels, but its image {image.shape[:2]}; "
            "write a mask of the image's size",
        )
        return {"image": image, "mask": mask}

    def subset(self, index: np.ndarray) -> MaskSource:
        images, masks = (tuple(paths[i] for i in index) for paths in (self.images, self.masks))
        return MaskSource(images, masks, self.num_classes)

    def _mask(self, path: Path) -> np.ndarray:
        try:
            mask = np.asarray(Image.open(path))  # of a palette its indices, not its colours
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DiscoError(f"`mask` {path} cannot be read ({error}); replace the file") from None
        known = mask.ndim == 2 and bool(((mask < self.num_classes) | (mask == 255)).all())
        require(
            known,
            f"`mask` {path} must have one number for each pixel, below the {self.num_classes} "
            f"classes of {CLASSES} or 255 (ignored), but has shape {mask.shape} and numbers up to "
            f"{mask.max(initial=0)}; write a grey or palette image",
        )
        return mask.astype(np.uint8)


def masks(root: str, split: str) -> MaskSource:
    """``ROOT/SPLIT/{images/NAME.*,masks/NAME.png}``, the names of the classes in ``classes.txt``.

    Without a folder ``validation`` a tenth of ``train`` validates.
    """
    names = Path(root) / CLASSES
    require(
        names.is_file(),
        f"`data.source` (=masks:{root}) needs the file {names} with the name of a class on each "
        "line; write it, or name another root",
    )
    num_classes = len(names.read_text().strip().splitlines())
    carved = split != "test" and not (Path(root) / "validation").is_dir()
    found = _pairs(Path(root) / ("train" if carved else split), num_classes)
    return found.subset(hold_out(len(found), split)) if carved else found


def _pairs(folder: Path, num_classes: int) -> MaskSource:
    require(
        (folder / "images").is_dir(),
        f"`{folder / 'images'}` is not a folder; put the images of the split there and their masks "
        "beside it in masks/",
    )
    images = image_files((folder / "images").iterdir())
    found = tuple(folder / "masks" / f"{image.stem}.png" for image in images)
    missing = [path for path in found if not path.is_file()]
    require(bool(images), f"`{folder / 'images'}` holds no images; put them there")
    require(
        not missing,
        f"`{folder}` has {len(missing)} images without a mask, such as "
        f"{', '.join(map(str, missing[:1]))}; write them",
    )
    return MaskSource(tuple(images), found, num_classes)
