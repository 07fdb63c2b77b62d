"""A contact sheet of what models answer: one row for each image, dense beside packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from disco_jax.data.imresize import imresize
from disco_jax.data.preprocess import Preprocess
from disco_jax.tasks import Classification, Detection, Segmentation, SuperResolution, Task
from disco_jax.tasks.detection import detect

Pixels = UInt8[np.ndarray, "h w 3"]
Cells = dict[str, tuple[Pixels, str]]  # column -> picture, and what is written below it
ROWS = 6
SURE = 0.4  # detections of lower scores are not drawn
DETAIL = 96  # pixels of an enlarged image that are shown
# Twenty colours that are told apart well, as many classes as most sets have; then again from 0.
PALETTE = (
    np.random.default_rng(3)
    .permutation([[r, g, b] for r in (40, 150, 250) for g in (40, 150, 250) for b in (60, 220)])
    .astype(np.uint8)
)


def write(
    task: Task,
    preprocess: Preprocess,
    batch: Mapping[str, np.ndarray],
    answers: Mapping[str, Any],
    path: Path,
) -> None:
    """Draws the first images of a batch with their truth and every model's answer.

    Args:
      task: what the models are trained for.
      preprocess: what made the batch; its mean and std are taken back.
      batch: as in evaluation.
      answers: outputs for that batch by the name of the model.
      path: of the PNG file.
    """
    from matplotlib.figure import Figure

    cells, count = CELLS[type(task)], min(ROWS, int(batch["weight"].sum()))
    rows = [cells(task, preprocess, batch, answers, i) for i in range(count)]
    height, width = rows[0]["image"][0].shape[:2]
    size = (2.2 * len(rows[0]), (0.35 + 2.2 * height / width) * count)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(count, len(rows[0]), squeeze=False)
    for i, row in enumerate(rows):
        for axes, (name, (picture, said)) in zip(grid[i], row.items(), strict=True):
            axes.imshow(picture)
            axes.set_title(name if i == 0 else "", fontsize=9)
            axes.set_xlabel(said, fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
    figure.savefig(path, dpi=110)


def _pixels(image: Float[np.ndarray, "h w c"], preprocess: Preprocess) -> Pixels:
    scaled = image * np.asarray(preprocess.std) + np.asarray(preprocess.mean)
    pixels = np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


def _classes(task: Any, preprocess: Preprocess, batch: Any, answers: Any, i: int) -> Cells:
    image = _pixels(batch["image"][i], preprocess)
    found = {name: (image, f"{np.argmax(logits[i])}") for name, logits in answers.items()}
    return {"image": (image, ""), "truth": (image, str(batch["label"][i])), **found}


def _masks(task: Any, preprocess: Preprocess, batch: Any, answers: Any, i: int) -> Cells:
    image = _pixels(batch["image"][i], preprocess)
    counts = batch["mask"][i] != task.ignore

    def painted(mask: np.ndarray) -> Pixels:
        return PALETTE[mask % len(PALETTE)] * counts[..., None]

    found = {}
    for name, logits in answers.items():
        mask = np.argmax(logits[i], -1)
        right = np.mean((mask == batch["mask"][i])[counts]) if counts.any() else 1.0
        found[name] = (painted(mask), f"{100 * right:.0f} % of the pixels")
    truth = painted(np.where(counts, batch["mask"][i], 0))
    return {"image": (image, ""), "truth": (truth, ""), **found}


def _boxes(task: Any, preprocess: Preprocess, batch: Any, answers: Any, i: int) -> Cells:
    image = _pixels(batch["image"][i], preprocess)
    cells = {"image": (image, "")}
    real = batch["classes"][i] >= 0
    count = f"{real.sum()} objects"
    cells["truth"] = (_drawn(image, batch["boxes"][i][real], batch["classes"][i][real]), count)
    for name, outputs in answers.items():
        found = {k: np.asarray(v)[i] for k, v in detect(outputs).items()}
        sure = found["scores"] >= SURE
        picture = _drawn(image, found["boxes"][sure], found["classes"][sure])
        cells[name] = (picture, f"{sure.sum()} found")
    return cells


def _drawn(image: Pixels, boxes: np.ndarray, classes: np.ndarray) -> Pixels:
    """Boxes in the colours of their classes, and the numbers of these."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for box, label in zip(boxes, classes, strict=True):
        colour = tuple(PALETTE[int(label) % len(PALETTE)].tolist())
        x1, y1, x2, y2 = (box * np.tile(picture.size, 2)).tolist()
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour)
        draw.text((x1 + 2, y1), str(int(label)), fill=colour)
    return np.asarray(picture)


def _enlarged(task: Any, preprocess: Preprocess, batch: Any, answers: Any, i: int) -> Cells:
    small = _pixels(batch["image"][i], preprocess)
    target = _pixels(batch["target"][i], preprocess)
    top, left = (max(0, (side - DETAIL) // 2 // task.scale) for side in target.shape[:2])
    region = np.s_[top : top + DETAIL // task.scale, left : left + DETAIL // task.scale]
    large = tuple(slice(s.start * task.scale, s.stop * task.scale) for s in region)
    shown = {"bicubic": imresize(small, target.shape[:2])}
    shown |= {name: _pixels(image[i], preprocess) for name, image in answers.items()}
    found = {name: (picture[large], _psnr(picture, target)) for name, picture in shown.items()}
    return {"image": (small[region], ""), **found, "truth": (target[large], "")}


def _psnr(picture: Pixels, target: Pixels) -> str:
    error = np.mean(np.square(picture.astype(float) - target))
    return f"{10 * np.log10(255**2 / max(error, 1e-9)):.2f} dB, three colours"


CELLS: dict[type[Any], Callable[..., Cells]] = {
    Classification: _classes,
    Detection: _boxes,
    Segmentation: _masks,
    SuperResolution: _enlarged,
}
