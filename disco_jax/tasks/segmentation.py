"""Semantic segmentation: a class for each pixel; cross-entropy, mIoU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from disco_jax.tasks import distillation
from disco_jax.tasks.task import Batch, Measures

Logits = Float[Array, "b h w classes"]
Outputs = Logits | tuple[Logits, Logits]  # the second is an auxiliary head's, in training


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """One class for each pixel; batches have ``"mask"``, ``int[b, h, w]``.

    Attributes:
      num_classes: classes, the background's included.
      ignore: the label of pixels that count nowhere.
      auxiliary_weight: of the auxiliary head's loss, where the model has one.
    """

    num_classes: int
    ignore: int = 255
    auxiliary_weight: float = 0.4
    metric = "mIoU"
    unit = "%"

    def loss(self, outputs: Outputs, batch: Batch) -> Float[Array, ""]:
        """Mean cross-entropy over the pixels that count, of all images together."""
        if isinstance(outputs, tuple):
            main, side = outputs
            return self.loss(main, batch) + self.auxiliary_weight * self.loss(side, batch)
        each, counts = self._cross_entropy(outputs, batch["mask"])
        return jnp.sum(each) / jnp.maximum(jnp.sum(counts), 1)

    def imitation(self, outputs: Outputs, teacher: Logits, temperature: float) -> Float[Array, ""]:
        """The teacher's soft labels at every pixel."""
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        pixels, shown = (x.reshape(-1, x.shape[-1]) for x in (logits, teacher))
        return distillation.soft_labels(pixels, shown, temperature)

    def measure(self, outputs: Logits, batch: Batch) -> Measures:
        """The confusion matrix ``[truth, answer]`` in pixels; the sum of losses, and of pixels."""
        weight = batch["weight"][:, None, None]
        each, counts = self._cross_entropy(outputs, batch["mask"])
        shown = (counts * weight).astype(jnp.int32)  # float32 would end at 2^24 pixels
        truth = jnp.where(shown > 0, batch["mask"].astype(jnp.int32), 0)  # uint8 would overflow
        pairs = truth * self.num_classes + outputs.argmax(-1)
        confusion = jnp.bincount(
            pairs.reshape(-1), shown.reshape(-1), length=self.num_classes**2
        ).reshape(self.num_classes, self.num_classes)
        return {"confusion": confusion, "loss": jnp.sum(each * weight), "count": jnp.sum(shown)}

    def answer(self, outputs: Logits) -> Measures:
        """The best class of each pixel: ``mask``, ``uint8[b, h, w]``."""
        return {"mask": outputs.argmax(-1).astype(jnp.uint8)}

    def said(self, answer: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Which share of the pixels each class has; the picture is the mask, without filling."""
        mask = answer["mask"]
        height, width = answer.get("extent", mask.shape)
        classes, counts = np.unique(mask[:height, :width], return_counts=True)
        shares = zip(classes.tolist(), (counts / counts.sum()).round(4).tolist(), strict=True)
        return {"shares": {str(c): share for c, share in shares}, "picture": mask[:height, :width]}

    def summary(self, found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """``mIoU``, ``pixel accuracy`` and mean ``loss``, over all pixels of the set."""
        confusion = sum(np.asarray(part["confusion"], np.float64) for part in found)
        count = sum(float(part["count"]) for part in found)
        return {
            "mIoU": mean_iou(np.asarray(confusion)),
            "pixel accuracy": float(np.trace(confusion) / max(count, 1)),
            "loss": sum(float(part["loss"]) for part in found) / max(count, 1),
        }

    def _cross_entropy(
        self, logits: Logits, mask: Int[Array, "b h w"]
    ) -> tuple[Float[Array, "b h w"], Float[Array, "b h w"]]:
        """Of each pixel, 0 for those that are ignored; and 1 for each that counts."""
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        counts = (mask != self.ignore).astype(wide.dtype)
        labels = jnp.where(mask == self.ignore, 0, mask)
        each = optax.softmax_cross_entropy_with_integer_labels(wide, labels)
        return each * counts, counts


def mean_iou(confusion: Float[np.ndarray, "classes classes"]) -> float:
    """Mean over the classes of intersection over union, as PASCAL VOC counts it.

    Classes that occur neither in the truth nor in an answer do not count.

    >>> mean_iou(np.array([[1., 1.], [0., 2.]])).__round__(4)
    0.5833
    """
    common = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - common
    return float(np.mean(common[union > 0] / union[union > 0])) if union.any() else 0.0
