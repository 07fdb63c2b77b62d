"""Super-resolution: mean absolute error; PSNR and SSIM of the luma; the self-ensemble."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.tasks.task import Batch, Measures

PEAK = 255.0  # the largest value of a pixel
BEST = 100.0  # dB, of equal images, whose PSNR is infinite
LUMA = (65.481, 128.553, 24.966)  # of red, green, blue: ITU-R BT.601, 16 for black, 235 for white

Images = Float[Array, "b h w c"]
Planes = Float[Array, "b h w"]


@dataclasses.dataclass(frozen=True)
class SuperResolution:
    """Images ``scale`` times as high and wide; batches have the true ones as ``"target"``.

    Outputs and targets, ``f32[b, h*scale, w*scale, c]``, are normalised as the model's input is:
    ``(pixel / 255 - mean) / std``.

    Attributes:
      scale: by how much; as many pixels along each border are not measured.
      mean, std: for each channel, in units of the full range 0 to 1.
      self_ensemble: whether evaluation takes the mean of eight flips and rotations.

    Raises:
      DiscoError: if there are not 1 or 3 channels, or outputs have not the shape of the targets.
    """

    scale: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    self_ensemble: bool = False
    metric = "PSNR"
    unit = "dB"

    def __post_init__(self) -> None:
        require(self.scale >= 1, f"`scale` (={self.scale}) must be at least 1; enlarge by 2, 3, 4")
        require(
            len(self.mean) == len(self.std) and len(self.mean) in (1, 3),
            f"`mean` (={self.mean}) and `std` (={self.std}) must have 1 entry for grey or 3 for "
            "red, green, blue; give one for each channel",
        )

    def loss(self, outputs: Images, batch: Batch) -> Float[Array, ""]:
        """Mean absolute error, as EDSR has it (Lim et al. 2017, arXiv 1707.02921).

        >>> task = SuperResolution(scale=2, mean=(0.5,), std=(1.0,))
        >>> float(task.loss(jnp.ones((1, 2, 2, 1)), {"target": jnp.zeros((1, 2, 2, 1))}))
        1.0
        """
        return _absolute_error(outputs, batch["target"]).mean()

    def imitation(self, outputs: Images, teacher: Images, temperature: float) -> Float[Array, ""]:
        """Mean absolute error against the teacher's images; there is no temperature in it."""
        return _absolute_error(outputs, teacher).mean()

    def measure(self, outputs: Images, batch: Batch) -> Measures:
        """Sums over the images of weight 1: ``psnr`` in dB, ``ssim``, ``loss`` and ``count``.

        PSNR and SSIM are of the luma of 8-bit images without their border.
        """
        weight = batch["weight"]
        found, truth = (self._measured(images) for images in (outputs, batch["target"]))
        each = {
            "psnr": psnr(found, truth),
            "ssim": ssim(found, truth),
            "loss": _absolute_error(outputs, batch["target"]),
            "count": jnp.ones_like(weight),
        }
        return {name: jnp.sum(values * weight) for name, values in each.items()}

    def answer(self, outputs: Images) -> Measures:
        """``picture``, ``uint8[b, h, w, c]``."""
        return {"picture": self._pixels(outputs).astype(jnp.uint8)}

    def said(self, answer: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The picture, and its size."""
        picture = answer["picture"]
        return {"height": picture.shape[0], "width": picture.shape[1], "picture": picture}

    def summary(self, found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """``PSNR`` in dB, ``SSIM`` and ``loss``: means over the images."""
        names = {"PSNR": "psnr", "SSIM": "ssim", "loss": "loss"}
        count = sum(float(part["count"]) for part in found)
        return {
            shown: sum(float(part[name]) for part in found) / count for shown, name in names.items()
        }

    def _measured(self, images: Images) -> Planes:
        """Normalised images as the luma of 8-bit ones, cut by ``scale`` pixels on each side."""
        inner = slice(self.scale, -self.scale)
        return luma(self._pixels(images)[:, inner, inner])

    def _pixels(self, images: Images) -> Images:
        """Normalised images as 8-bit ones, still in floating point."""
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.std))
        return jnp.round(jnp.clip(PEAK * (images.astype(jnp.float32) * std + mean), 0, PEAK))


def luma(images: Float[Array, "... h w c"]) -> Float[Array, "... h w"]:
    """Y of YCbCr, 16 to 235, of red, green and blue from 0 to 255; a grey image is its own.

    As MATLAB's ``rgb2ycbcr``, but not rounded to integers.

    >>> luma(jnp.array([[[255., 255., 255.]], [[0., 0., 0.]]]))[:, 0].tolist()
    [235.0, 16.0]
    """
    if images.shape[-1] == 1:
        return images[..., 0]
    return 16 + jnp.sum(images * (jnp.asarray(LUMA, images.dtype) / PEAK), axis=-1)


def psnr(a: Planes, b: Planes) -> Float[Array, "b"]:
    """``10 · log10(255² / mean (a - b)²)`` in dB for each image, at most 100.

    >>> psnr(jnp.zeros((1, 2, 2)), jnp.full((1, 2, 2), 25.5)).tolist()
    [20.0]
    """
    error = jnp.mean(jnp.square(a - b), axis=(1, 2))
    return 10 * jnp.log10(PEAK**2 / jnp.maximum(error, PEAK**2 * 10 ** (-BEST / 10)))


def ssim(a: Planes, b: Planes) -> Float[Array, "b"]:
    """Structural similarity for each image (Wang et al. 2004, doi 10.1109/TIP.2003.819861).

    Mean of ``(2·μa·μb + C1) · (2·σab + C2) / ((μa² + μb² + C1) · (σa² + σb² + C2))`` over the
    places of a Gaussian window, 11 pixels wide and of deviation 1.5, that lie within the image;
    ``C1 = (0.01 · 255)²``, ``C2 = (0.03 · 255)²``.

    Raises:
      DiscoError: if the images are smaller than the window.
    """
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    a, b = a - PEAK / 2, b - PEAK / 2  # variances stay, and lose fewer digits
    mean_a, mean_b = _window(a), _window(b)
    var_a, var_b = _window(a * a) - mean_a**2, _window(b * b) - mean_b**2
    covariance = _window(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + PEAK / 2, mean_b + PEAK / 2
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return jnp.mean(light * structure, axis=(1, 2))


def _window(planes: Planes, width: int = 11, deviation: float = 1.5) -> Planes:
    """Gaussian means, where the whole window lies within the image."""
    rows, columns = (size - width + 1 for size in planes.shape[1:])
    require(
        rows > 0 and columns > 0,
        f"`images` to compare have {planes.shape[1]} x {planes.shape[2]} pixels without the "
        f"border, but must have at least {width} x {width}, the window of SSIM; use larger ones",
    )
    weights = np.exp(-np.square((np.arange(width) - width // 2) / deviation) / 2)
    taps = list(enumerate((weights / weights.sum()).tolist()))
    planes = sum((w * planes[:, i : i + rows] for i, w in taps), jnp.zeros(()))
    return sum((w * planes[:, :, i : i + columns] for i, w in taps), jnp.zeros(()))


def self_ensemble(run: Callable[[Images], Images], images: Images) -> Images:
    """Mean of what ``run`` makes of the eight flips and rotations, each turned back: EDSR+.

    Lim et al. 2017, section 3.4. Four of the eight have height and width exchanged.
    """
    total = jnp.zeros(())
    for turns, mirrored in itertools.product(range(4), (False, True)):
        seen = jnp.rot90(images, turns, axes=(1, 2))
        answer = run(seen[:, :, ::-1])[:, :, ::-1] if mirrored else run(seen)
        total = total + jnp.rot90(answer, -turns, axes=(1, 2))
    return total / 8


def _absolute_error(outputs: Images, target: Images) -> Float[Array, "b"]:
    """Mean for each image."""
    require(
        outputs.shape == target.shape,
        f"`outputs` have shape {outputs.shape}, but must have that of the targets, "
        f"{target.shape}; give model and data the same `scale` and channels",
    )
    wide = jnp.promote_types(outputs.dtype, jnp.float32)
    return jnp.mean(jnp.abs(outputs.astype(wide) - target), axis=(1, 2, 3))
