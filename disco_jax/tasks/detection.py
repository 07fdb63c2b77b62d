"""Object detection with default boxes: SSD's loss, detections, mAP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.tasks import distillation
from disco_jax.tasks.average_precision import coco_ap, voc_ap50
from disco_jax.tasks.boxes import decode
from disco_jax.tasks.matching import targets
from disco_jax.tasks.nms import nms
from disco_jax.tasks.task import Batch, Measures

Outputs = Mapping[str, Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class Detection:
    """Boxes and classes of objects, from answers relative to default boxes.

    Outputs have ``"scores"``, ``f[b, n, 1 + num_classes]``, logits with the background's first;
    ``"offsets"``, ``f[b, n, 4]``, codes of boxes; ``"boxes"``, ``f[n, 4]``, the default boxes.
    Batches have ``"boxes"``, ``f[b, m, 4]``, corners as shares of the image; ``"classes"``,
    ``int[b, m]``, from 0, -1 for rows that only fill up; and where the data has such objects
    ``"difficult"`` and ``"crowd"``, ``bool[b, m]``. Neither need be found; crowds, which are not
    one object, are not trained for either.

    Attributes:
      num_classes: classes of objects, without the background.
      threshold: the overlap from which a default box answers for an object.
      negatives: default boxes of background in the loss, for each one that has an object.
      min_score: the least score of an answer; mAP takes lower ones too.
    """

    num_classes: int
    threshold: float = 0.5
    negatives: int = 3
    min_score: float = 0.2
    metric = "mAP"
    unit = "%"

    def loss(self, outputs: Outputs, batch: Batch) -> Float[Array, ""]:
        """Cross-entropy plus smooth L1 of the codes, over the boxes that have an object.

        Of the background only the boxes of highest loss count, ``negatives`` for each one that has
        an object, image by image. The sum is divided by the number of default boxes in the batch
        that have an object (Liu et al. 2016, arXiv 1512.02325, sections 2.2 and 2.3).

        Raises:
          DiscoError: the scores are not of ``num_classes``, or the batch has no row for objects.
        """
        each, positives = self._losses(outputs, batch)
        return jnp.sum(each) / jnp.maximum(jnp.sum(positives), 1)

    def imitation(self, outputs: Outputs, teacher: Outputs, temperature: float) -> Float[Array, ""]:
        """The teacher's soft classes, and smooth L1 between the codes, where it sees something.

        ``Σ w (T² KL + smooth L1) / Σ w`` over all default boxes, with the teacher's probability
        ``w`` that there is an object: most are surely background, and would drown the others.

        Raises:
          DiscoError: the teacher's default boxes or classes are others.
        """
        shapes = [out["scores"].shape for out in (outputs, teacher)]
        require(
            shapes[0] == shapes[1],
            f"the scores (={shapes[0]}: images, default boxes, classes) must be of the teacher's "
            f"shape (={shapes[1]}); give both models the same default boxes and classes",
        )
        (scores, offsets), (soft, codes) = _wide(outputs), _wide(teacher)
        weight = jax.nn.softmax(soft)[..., 1:].sum(-1)
        each_box = jax.vmap(jax.vmap(distillation.soft_labels, (0, 0, None)), (0, 0, None))
        apart = each_box(scores, soft, temperature) + optax.huber_loss(offsets, codes).sum(-1)
        return jnp.sum(weight * apart) / jnp.maximum(jnp.sum(weight), 1e-12)

    def measure(self, outputs: Outputs, batch: Batch) -> Measures:
        """Detections and truth, see ``tasks.average_precision``; sums of losses and of boxes."""
        each, positives = self._losses(outputs, batch)
        truth = {"true_boxes": batch["boxes"], "true_classes": batch["classes"]}
        ignored = _flag(batch, "difficult") | _flag(batch, "crowd")
        sums = {
            "loss": jnp.sum(each * batch["weight"]),
            "count": jnp.sum(positives * batch["weight"]),
        }
        return detect(outputs) | truth | sums | {"ignored": ignored, "weight": batch["weight"]}

    def answer(self, outputs: Outputs) -> Measures:
        """The surest objects, see :func:`detect`."""
        return detect(outputs, min_score=self.min_score)

    def said(self, answer: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """``{"objects": [{"class", "score", "box"}]}``, the surest first; corners as shares."""
        found = zip(*(answer[k].tolist() for k in ("classes", "scores", "boxes")), strict=True)
        objects = [
            {"class": label, "score": round(score, 4), "box": [round(side, 4) for side in box]}
            for label, score, box in found
            if label >= 0
        ]
        return {"objects": objects}

    def summary(self, found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """``mAP``, ``AP50`` and ``AP75`` as COCO counts, ``VOC AP50``, and mean ``loss``.

        COCO's metrics for small, medium and large objects are not here: they need the pixels of
        the original images.

        Raises:
          DiscoError: ``faster_coco_eval`` is not installed.
        """
        found = [{name: np.asarray(value) for name, value in part.items()} for part in found]
        count = sum(float(part["count"]) for part in found)
        loss = sum(float(part["loss"]) for part in found) / max(count, 1)
        return coco_ap(found) | {"VOC AP50": voc_ap50(found), "loss": loss}

    def _losses(
        self, outputs: Outputs, batch: Batch
    ) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
        """Of each image: the sum of its losses, and its default boxes that have an object."""
        scores, offsets = _wide(outputs)
        require(
            scores.shape[-1] == 1 + self.num_classes and batch["classes"].shape[1] > 0,
            f"the scores (={scores.shape}) must be of the background and {self.num_classes} "
            f"classes, and the batch must have a row for objects (its classes are "
            f"{batch['classes'].shape}); set `num_classes`, or fill up with class -1",
        )
        classes = jnp.where(_flag(batch, "crowd"), -1, batch["classes"])
        labels, codes = targets(batch["boxes"], classes, outputs["boxes"], self.threshold)
        positive = labels > 0
        positives = jnp.sum(positive, 1, dtype=scores.dtype)
        each = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        hardest = jnp.sort(jnp.where(positive, 0, each), descending=True)  # losses are not negative
        mined = jnp.arange(each.shape[1]) < self.negatives * positives[:, None]
        apart = each + optax.huber_loss(offsets, codes).sum(-1)
        return jnp.sum(jnp.where(positive, apart, 0) + jnp.where(mined, hardest, 0), 1), positives


def detect(
    outputs: Outputs,
    *,
    min_score: float = 0.01,
    threshold: float = 0.45,
    candidates: int = 400,
    limit: int = 200,
) -> dict[str, Array]:
    """Outputs of a detector, see :class:`Detection`, to boxes in the image; runs under ``jit``.

    Args:
      min_score: the probability that a candidate must exceed.
      threshold: the largest overlap of two boxes of one class that both stay.
      candidates: the best of each class, which suppression looks at.
      limit: detections in an image, ``k``.

    Returns:
      ``{"boxes": f32[b, k, 4], "scores": f32[b, k], "classes": int32[b, k]}`` by falling score:
      corners, as shares of the image and inside it; probabilities; classes from 0. Where nothing
      is left the score is 0 and the class -1.
    """
    scores, offsets = _wide(outputs)
    boxes = jnp.clip(decode(offsets, outputs["boxes"]), 0, 1)
    probable = jax.nn.softmax(scores)[..., 1:]
    one = partial(_best, threshold=threshold, candidates=candidates, limit=limit)
    return jax.vmap(one)(boxes, jnp.where(probable > min_score, probable, 0))


def _best(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, "n classes"],
    *,
    threshold: float,
    candidates: int,
    limit: int,
) -> dict[str, Array]:
    top, place = jax.lax.top_k(scores.T, min(candidates, len(scores)))
    classes = jnp.repeat(jnp.arange(len(top), dtype=jnp.int32), top.shape[1])
    boxes, top = boxes[place.reshape(-1)], top.reshape(-1)
    taken = nms(boxes, top, classes, threshold, limit)
    real = taken >= 0
    return {
        "boxes": jnp.where(real[:, None], boxes[taken], 0),
        "scores": jnp.where(real, top[taken], 0),
        "classes": jnp.where(real, classes[taken], -1),
    }


def _wide(outputs: Outputs) -> tuple[Float[Array, "b n classes"], Float[Array, "b n 4"]]:
    """Scores and offsets in single precision or better."""
    scores, offsets = outputs["scores"], outputs["offsets"]
    wide = jnp.promote_types(scores.dtype, jnp.float32)
    return scores.astype(wide), offsets.astype(wide)


def _flag(batch: Batch, name: str) -> Array:
    return jnp.asarray(batch.get(name, jnp.zeros(batch["classes"].shape, bool)))
