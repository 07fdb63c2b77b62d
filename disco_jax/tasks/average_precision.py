"""Average precision of detections, as COCO and as PASCAL VOC count it.

Both read measures of batches, as ``Detection.measure`` returns them: detections in ``"boxes"``,
``f32[b, k, 4]``, ``"scores"``, ``f32[b, k]``, and ``"classes"``, ``int[b, k]``; the truth in
``"true_boxes"``, ``f32[b, m, 4]``, ``"true_classes"``, ``int[b, m]``, and ``"ignored"``,
``bool[b, m]``, for objects that need not be found; and ``"weight"``, ``f32[b]``. Boxes are shares
of the image; rows of class -1 and images of weight 0 only fill up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from disco_jax.errors import DiscoError
from disco_jax.tasks.boxes import overlap

Found = Mapping[str, np.ndarray]
SIDE = 1000  # of an image for COCO's evaluation, which counts in pixels


def coco_ap(found: Sequence[Found]) -> dict[str, float]:
    """``mAP``, the mean over the overlaps 0.5, 0.55, ... 0.95; ``AP50``; ``AP75``.

    For objects of any size, computed by ``faster_coco_eval`` as COCO does (Lin et al. 2014, arXiv
    1405.0312): mean over 101 recalls and the classes that occur, 100 detections of an image and
    class at most. An ignored object is COCO's crowd: what lies in it counts for nothing. Without
    objects all are 0.

    Raises:
      DiscoError: ``faster_coco_eval`` is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise DiscoError(
            "COCO's mAP needs `faster_coco_eval`, which is not installed; "
            "pip install faster-coco-eval"
        ) from error
    objects = _rows(found, "true_boxes", "ignored", "true_classes")
    answers = _rows(found, "boxes", "scores", "classes")
    if not len(objects) or not len(answers):
        return dict.fromkeys(("mAP", "AP50", "AP75"), 0.0)
    truth = COCO(
        {
            "images": [{"id": i} for i in range(sum(len(part["weight"]) for part in found))],
            "categories": [{"id": int(c)} for c in np.unique(objects[:, 6])],
            "annotations": [_annotation(i, *row) for i, row in enumerate(objects.tolist(), 1)],
        }
    )
    run = COCOeval_faster(truth, truth.loadRes(answers), "bbox", print_function=lambda *_: None)
    run.params.areaRng, run.params.areaRngLbl, run.params.maxDets = [[0, 1e10]], ["all"], [100]
    run.evaluate()
    run.accumulate()
    precision = np.asarray(run.eval["precision"])  # overlap, recall, class, area, detections
    return {"mAP": _mean(precision), "AP50": _mean(precision[0]), "AP75": _mean(precision[5])}


def _rows(
    found: Sequence[Found], boxes: str, values: str, classes: str
) -> Float[np.ndarray, "rows 7"]:
    """Of each real box: image, x, y, width, height, value, class."""
    rows, images = [np.zeros((0, 7))], 0
    for part in found:
        place = np.nonzero((part[classes] >= 0) & (part["weight"][:, None] > 0))
        low, high = np.split(SIDE * np.asarray(part[boxes], np.float64)[place], 2, -1)
        image, value, label = images + place[0], part[values][place], part[classes][place]
        rows.append(np.column_stack([image, low, high - low, value, label]))
        images += len(part["weight"])
    return np.concatenate(rows)


def _annotation(
    number: int, image: float, x: float, y: float, w: float, h: float, crowd: float, label: float
) -> dict[str, object]:
    place = {"id": number, "image_id": int(image), "category_id": int(label)}
    return place | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(crowd)}


def _mean(precision: Float[np.ndarray, "..."]) -> float:
    """COCO writes -1 for classes all of whose objects are ignored."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else 0.0


def voc_ap50(found: Sequence[Found]) -> float:
    """Mean over the classes that occur of the average precision at an overlap of 0.5.

    As PASCAL VOC counts since 2010 (Everingham et al. 2015): a detection answers for the object of
    its class that it overlaps most; the first to do so is right, further ones are wrong, those
    for an ignored (VOC: difficult) object count for nothing. Without objects it is 0.
    """
    scores, classes, right = (
        np.concatenate([np.zeros(0), *parts]) for parts in zip(*map(_judged, found), strict=True)
    )
    truth = [part["true_classes"][_counts(part)] for part in found]
    order = np.argsort(-scores, kind="stable")
    classes, right = classes[order], right[order].astype(bool)
    names, counts = np.unique(np.concatenate(truth), return_counts=True)
    each = [average_precision(right[classes == c], n) for c, n in zip(names, counts, strict=True)]
    return float(np.mean(each)) if each else 0.0


def average_precision(right: Bool[np.ndarray, "n"], objects: int) -> float:
    """Area under the precision's envelope: at each recall the best precision there or beyond.

    Args:
      right: of the detections by falling score.
      objects: how many there are to find.

    >>> average_precision(np.array([True, False, True]), 2).__round__(4)
    0.8333
    """
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[right].sum() / objects)  # every hit is a step of 1 / objects


def _counts(part: Found) -> Bool[np.ndarray, "b m"]:
    real = (part["true_classes"] >= 0) & (part["weight"][:, None] > 0)
    return real & ~part["ignored"]


def _judged(part: Found) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the detections that count: score, class, and whether each is right."""
    scores, classes, labels = part["scores"], part["classes"], part["true_classes"]
    same = (classes[:, :, None] == labels[:, None]) & (labels >= 0)[:, None]
    shares = np.where(same, overlap(part["boxes"][:, :, None], part["true_boxes"][:, None]), 0)
    best, hit = shares.argmax(-1), shares.max(-1) >= 0.5
    surest = np.argsort(-scores, axis=1, kind="stable").argsort(1)
    earlier = surest[:, None] < surest[:, :, None]
    rivals = (best[:, :, None] == best[:, None]) & hit[:, None] & earlier
    pardoned = hit & np.take_along_axis(part["ignored"], best, 1)
    counts = (classes >= 0) & (part["weight"][:, None] > 0) & ~pardoned
    return scores[counts], classes[counts], (hit & ~rivals.any(-1))[counts]
