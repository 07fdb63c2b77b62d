"""Detection: assignment, loss and suppression against torchvision's and loops; mAP by hand."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, import_torchvision

from disco_jax.errors import DiscoError
from disco_jax.tasks.average_precision import coco_ap, voc_ap50
from disco_jax.tasks.boxes import decode, default_boxes, encode, overlap
from disco_jax.tasks.detection import Detection, detect
from disco_jax.tasks.matching import assign, targets
from disco_jax.tasks.nms import nms

DEFAULTS = default_boxes([(6, 6), (3, 3), (1, 1)], (0.2, 0.4, 0.7, 1.0), [(2,), (2, 3), (2,)])
QUARTERS = default_boxes([(2, 2)], (0.5, 0.5), [()])[::2]  # left to right, then down
CLASSES = 4


@pytest.fixture(scope="module")
def ssd():
    """torchvision's, of which the Python half is enough: see helpers.py."""
    torchvision = import_torchvision()
    if torchvision is None:
        pytest.skip("torchvision is not installed")
    return torchvision.models.detection.ssd


def random_boxes(rng, *shape, low=0.05, high=0.6):
    centre, size = rng.uniform(0.1, 0.9, (*shape, 2)), rng.uniform(low, high, (*shape, 2))
    corners = np.concatenate([centre - size / 2, centre + size / 2], -1)
    return np.clip(corners, 0, 1).astype(np.float32)


def random_batch(rng, images=3, rows=6):
    classes = rng.integers(0, CLASSES, (images, rows)).astype(np.int32)
    classes[np.arange(rows) >= np.arange(1, images + 1)[:, None] * 2] = -1  # 2, 4, 6 objects
    boxes = random_boxes(rng, images, rows) * (classes >= 0)[..., None]
    return {"boxes": boxes, "classes": classes, "weight": np.ones(images, np.float32)}


def random_outputs(rng, images=3, sure=1.0):
    count = len(DEFAULTS)
    scores = sure * rng.normal(size=(images, count, 1 + CLASSES))
    offsets = rng.normal(size=(images, count, 4))
    found = {"scores": scores, "offsets": offsets, "boxes": DEFAULTS}
    return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}


def right_outputs(batch):
    """What says exactly the truth, at one default box for each object."""
    scores = np.full((*batch["classes"].shape[:1], len(DEFAULTS), 1 + CLASSES), -20.0, np.float32)
    scores[..., 0] = 20
    offsets = np.zeros((*scores.shape[:2], 4), np.float32)
    for image, row in np.argwhere(batch["classes"] >= 0):
        box = batch["boxes"][image, row]
        free = np.where(scores[image, :, 0] > 0, overlap(box, DEFAULTS), -1)
        place = int(np.argmax(free))
        scores[image, place, 0] = -20
        scores[image, place, 1 + batch["classes"][image, row]] = 20
        offsets[image, place] = encode(box, DEFAULTS[place])
    return {"scores": scores, "offsets": offsets, "boxes": DEFAULTS}


# Assignment


def test_every_object_gets_a_default_box():
    objects = jnp.array(
        [
            [0.0, 0.0, 0.5, 0.45],  # most of the first quarter
            [0.6, 0.1, 0.7, 0.2],  # a crumb of the second
            [0.1, 0.6, 0.5, 1.0],  # 0.64 of the third ...
            [0.0, 0.9, 0.1, 1.0],  # ... where this one has its best, and comes last
            [0.0, 0.0, 0.0, 0.0],  # fill
        ]
    )
    real = jnp.arange(5) < 4
    give = jax.jit(assign)
    assert give(objects, real, QUARTERS).tolist() == [0, 1, 3, -1]
    assert give(objects[:3], real[:3], QUARTERS).tolist() == [0, 1, 2, -1]
    assert give(objects, real & False, QUARTERS).tolist() == [-1] * 4
    shifted = jnp.array([[0.0, 0.0, 0.5, 1.0]])  # overlaps two quarters by just a half
    assert give(shifted, real[:1], QUARTERS).tolist() == [0, -1, 0, -1]
    assert give(shifted, real[:1], QUARTERS, 0.51).tolist() == [0, -1, -1, -1]


def test_targets_are_classes_and_codes():
    objects = jnp.array([[[0.0, 0.0, 0.5, 0.25], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    labels, codes = jax.jit(targets)(objects, jnp.array([[2, -1], [-1, -1]]), QUARTERS)
    assert labels.tolist() == [[3, 0, 0, 0], [0, 0, 0, 0]]
    close(codes[0, 0], [0, -2.5, 0, np.log(0.5) / 0.2], 1e-6)
    close(decode(codes[0, 0], QUARTERS[0]), objects[0, 0], 1e-6)


def test_assignment_is_torchvisions(ssd):
    import torch

    for seed in range(5):
        objects = random_boxes(np.random.default_rng(seed), 7)
        shares = torch.from_numpy(np.array(overlap(objects[:, None], DEFAULTS)))
        expected = ssd.det_utils.SSDMatcher(0.5)(shares).numpy()
        filled = np.concatenate([objects, np.zeros((3, 4), np.float32)])
        found = jax.jit(assign)(filled, np.arange(10) < 7, DEFAULTS)
        np.testing.assert_array_equal(found, np.maximum(expected, -1))
        assert (found >= 0).sum() > 7  # both rules were at work


# Loss


def test_loss_by_hand():
    """One object, four default boxes: two negatives count, the two that are most wrong."""
    scores = jnp.array([[[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 2.0]]])
    offsets = jnp.array([[[0.5, 0, 0, 0], [9, 9, 9, 9], [9, 9, 9, 9], [9, 9, 9, 9]]])
    outputs = {"scores": scores, "offsets": offsets, "boxes": jnp.asarray(QUARTERS)}
    batch = {"boxes": jnp.asarray(QUARTERS[None, :1]) - 0.01 * jnp.array([1.0, 0, 1, 0])}
    batch["classes"] = jnp.array([[0]])  # code -0.2 in x: 0.7 from 0.5
    expected = np.log(2) + np.log1p(np.exp(3)) + np.log1p(np.exp(2)) + 0.7**2 / 2
    loss = jax.jit(Detection(1, negatives=2).loss)(outputs, batch)
    close(loss, expected, 1e-5)


def test_loss_is_torchvisions(ssd):
    import torch

    rng = np.random.default_rng(0)
    batch, outputs = random_batch(rng), random_outputs(rng)
    theirs = SimpleNamespace(box_coder=ssd.det_utils.BoxCoder((10, 10, 5, 5)), neg_to_pos_ratio=3)
    truth, matched = [], []
    for boxes, classes in zip(batch["boxes"], batch["classes"], strict=True):
        boxes, classes = boxes[classes >= 0], classes[classes >= 0]
        shares = torch.from_numpy(np.array(overlap(boxes[:, None], DEFAULTS)))
        matched.append(ssd.det_utils.SSDMatcher(0.5)(shares))
        labels = torch.from_numpy(classes).long() + 1
        truth.append({"boxes": torch.from_numpy(boxes), "labels": labels})
    names = {"cls_logits": "scores", "bbox_regression": "offsets"}
    answers = {
        name: torch.from_numpy(np.array(outputs[ours])).requires_grad_()
        for name, ours in names.items()
    }
    anchors = [torch.from_numpy(DEFAULTS)] * len(truth)
    expected = sum(ssd.SSD.compute_loss(theirs, truth, answers, anchors, matched).values())
    expected.backward()
    loss, gradient = jax.jit(jax.value_and_grad(Detection(CLASSES).loss))(outputs, batch)
    close(loss, expected.detach().numpy(), 1e-5)
    for name, ours in names.items():
        close(gradient[ours], answers[name].grad.numpy(), 1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_images_without_objects(scale):
    """They add nothing to the loss, and the gradient stays finite."""
    rng = np.random.default_rng(1)
    task, batch, outputs = Detection(CLASSES), random_batch(rng), random_outputs(rng)
    outputs["scores"], outputs["offsets"] = scale * outputs["scores"], scale * outputs["offsets"]
    none = dict(batch, classes=np.full_like(batch["classes"], -1), boxes=0 * batch["boxes"])
    some = dict(none, classes=none["classes"].copy(), boxes=none["boxes"].copy())
    for name in ("classes", "boxes"):
        some[name][1] = batch[name][1]
    step = jax.jit(jax.value_and_grad(task.loss))
    loss, gradient = step(outputs, none)
    assert loss == 0
    assert all(not np.any(leaf) for leaf in (gradient["scores"], gradient["offsets"]))
    loss, gradient = step(outputs, some)
    alone = {k: v if k == "boxes" else v[1:2] for k, v in outputs.items()}
    close(loss, step(alone, {k: v[1:2] for k, v in batch.items()})[0], 1e-6)
    for leaf in (gradient["scores"], gradient["offsets"]):
        assert np.isfinite(leaf).all()
        assert np.any(leaf[1])
        assert not np.any(leaf[::2])


def test_crowds_are_not_trained_for_and_difficult_objects_are():
    rng = np.random.default_rng(2)
    loss, batch, outputs = jax.jit(Detection(CLASSES).loss), random_batch(rng), random_outputs(rng)
    chosen = np.zeros(batch["classes"].shape, bool)
    chosen[:, 1] = True
    without = dict(batch, classes=np.where(chosen, -1, batch["classes"]))
    assert loss(outputs, dict(batch, crowd=chosen)) == loss(outputs, without)
    assert loss(outputs, dict(batch, difficult=chosen)) == loss(outputs, batch)
    assert loss(outputs, without) != loss(outputs, batch)


def test_wrong_shapes_say_so():
    rng = np.random.default_rng(0)
    batch, outputs = random_batch(rng), random_outputs(rng)
    with pytest.raises(DiscoError, match="num_classes"):
        Detection(7).loss(outputs, batch)
    with pytest.raises(DiscoError, match="class -1"):
        Detection(CLASSES).loss(outputs, {k: v[:, :0] for k, v in batch.items() if v.ndim > 1})
    fewer = {"scores": outputs["scores"][:, 1:], "offsets": outputs["offsets"][:, 1:]}
    with pytest.raises(DiscoError, match="teacher"):
        Detection(CLASSES).imitation(fewer, outputs, 2.0)


# Imitation


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_imitation():
    rng = np.random.default_rng(3)
    student, teacher = random_outputs(rng), random_outputs(rng, sure=3.0)
    imitation = jax.jit(Detection(CLASSES).imitation)
    assert abs(imitation(teacher, teacher, 2.0)) < 1e-6
    logits, soft = np.float64(student["scores"]), np.float64(teacher["scores"])
    weight = 1 - softmax(soft)[..., 0]
    target = softmax(soft / 2)
    divergence = np.sum(target * (np.log(target) - np.log(softmax(logits / 2))), -1)
    apart = np.abs(np.float64(student["offsets"]) - np.float64(teacher["offsets"]))
    smooth = np.where(apart < 1, apart**2 / 2, apart - 0.5).sum(-1)
    expected = np.sum(weight * (4 * divergence + smooth)) / np.sum(weight)
    close(imitation(student, teacher, 2.0), expected, 1e-5)


# Suppression


def greedy(boxes, scores, classes, threshold):
    """The textbook's loop."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        rivals = [j for j in kept if classes[j] == classes[i]]
        if scores[i] > 0 and all(intersection(boxes[i], boxes[j]) <= threshold for j in rivals):
            kept.append(i)
    return kept


def intersection(a, b):
    """Over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (sum(areas) - common) if sum(areas) > common else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_suppression_is_the_loops(seed):
    rng = np.random.default_rng(seed)
    boxes, classes = random_boxes(rng, 120, low=0.3), rng.integers(0, 3, 120)
    scores = np.maximum(rng.uniform(-0.2, 1, 120), 0).astype(np.float32)
    expected = greedy(boxes.astype(float), scores, classes, 0.45)
    assert 10 < len(expected) < 80
    suppress = jax.jit(nms, static_argnames="limit")
    for limit in (8, 120):
        found = suppress(boxes, scores, classes, 0.45, limit=limit).tolist()
        assert found == (expected + [-1] * 120)[:limit]


def test_suppression_ends():
    """Boxes without area do not overlap even themselves, and are still taken once."""
    boxes, zeros = jnp.zeros((2, 4)), jnp.zeros(2, jnp.int32)
    assert nms(boxes, jnp.array([0.5, 0.6]), zeros, 0.45, 4).tolist() == [1, 0, -1, -1]
    assert nms(boxes, jnp.zeros(2), zeros, 0.45, 2).tolist() == [-1, -1]


def test_detections_are_torchvisions(ssd, monkeypatch):
    """With the loop above for the one operation that is not in the Python half."""
    import torch

    def batched(boxes, scores, classes, threshold):
        return torch.tensor(greedy(*(x.double().numpy() for x in (boxes, scores, classes)), 0.45))

    monkeypatch.setattr(ssd.box_ops, "batched_nms", batched)
    outputs = random_outputs(np.random.default_rng(5), sure=3.0)
    theirs = SimpleNamespace(
        box_coder=ssd.det_utils.BoxCoder((10, 10, 5, 5)),
        score_thresh=0.01,
        nms_thresh=0.45,
        topk_candidates=100,
        detections_per_img=150,
    )
    heads = {"cls_logits": outputs["scores"], "bbox_regression": outputs["offsets"]}
    heads = {name: torch.from_numpy(np.array(value)) for name, value in heads.items()}
    anchors, sizes = [torch.from_numpy(DEFAULTS)] * 3, [(1, 1)] * 3
    expected = ssd.SSD.postprocess_detections(theirs, heads, anchors, sizes)
    found = jax.jit(lambda out: detect(out, candidates=100, limit=150))(outputs)
    for image, answer in enumerate(expected):
        count = len(answer["scores"])
        assert count > 50
        close(found["scores"][image, :count], answer["scores"].numpy(), 1e-5)
        close(found["boxes"][image, :count], answer["boxes"].numpy(), 1e-5)
        np.testing.assert_array_equal(found["classes"][image, :count] + 1, answer["labels"])
        assert not np.any(found["scores"][image, count:])
        assert np.all(found["classes"][image, count:] == -1)


def test_detections_stay_in_the_image_and_fill_is_marked():
    batch = random_batch(np.random.default_rng(0))
    outputs = right_outputs(batch)
    outputs["offsets"] = outputs["offsets"] + np.float32([0, 0, 10, 1e3])  # wider, and overflows
    found = jax.jit(lambda out: detect(out, limit=300))(outputs)
    assert found["boxes"].shape == (3, 300, 4)
    assert found["classes"].dtype == jnp.int32
    counts = (found["classes"] >= 0).sum(1)
    assert (counts >= 1).all()
    assert (counts <= np.array([2, 4, 6])).all()
    assert np.all((found["boxes"] >= 0) & (found["boxes"] <= 1))
    assert np.all((found["scores"] > 0) == (found["classes"] >= 0))


# Average precision


def part(detections, truth, weight=1.0):
    """One image: ``(box, score, class)`` and ``(box, class, ignored)``; a row of fill in each."""
    detections = [*detections, (np.zeros(4), 0.0, -1)]
    truth = [*truth, (np.zeros(4), -1, False)]
    boxes, scores, classes = (np.array(column)[None] for column in zip(*detections, strict=True))
    objects, labels, ignored = (np.array(column)[None] for column in zip(*truth, strict=True))
    found = {"boxes": boxes, "scores": scores, "classes": classes, "weight": np.array([weight])}
    return found | {"true_boxes": objects, "true_classes": labels, "ignored": ignored}


A, B, C = np.array([[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.7], [0.1, 0.6, 0.3, 0.9]])
SHORT_B = np.array([0.5, 0.5, 0.74, 0.7])  # 0.6 of B
ALL = (51 + 50 * 2 / 3) / 101  # COCO: half of the recall at precision 1, the rest at 2/3
BY_HAND = {  # detections, truth: AP50, AP75 and VOC's AP50
    "perfect": ([(A, 0.9, 0), (B, 0.8, 1)], [(A, 0, False), (B, 1, False)], 1, 1, 1),
    "right, wrong, right": (
        [(A, 0.9, 0), (C, 0.8, 0), (B, 0.7, 0)],
        [(A, 0, False), (B, 0, False)],
        *(ALL, ALL, 5 / 6),
    ),
    "in any order": (
        [(B, 0.7, 0), (A, 0.9, 0), (C, 0.8, 0)],
        [(A, 0, False), (B, 0, False)],
        *(ALL, ALL, 5 / 6),
    ),
    "a duplicate is wrong": (
        [(A, 0.9, 0), (A, 0.8, 0), (B, 0.7, 0)],
        [(A, 0, False), (B, 0, False)],
        *(ALL, ALL, 5 / 6),
    ),
    "loosely": (
        [(A, 0.9, 0), (SHORT_B, 0.7, 0)],
        [(A, 0, False), (B, 0, False)],
        *(1, 51 / 101, 1),
    ),
    "of the wrong class": ([(A, 0.9, 1)], [(A, 0, False)], 0, 0, 0),
    "one class of two": ([(A, 0.9, 0)], [(A, 0, False), (B, 1, False)], 0.5, 0.5, 0.5),
    "what is ignored does not count": (
        [(C, 0.95, 0), (C, 0.94, 0), (A, 0.9, 0)],
        [(A, 0, False), (C, 0, True), (B, 1, True)],
        *(1, 1, 1),
    ),
    "all ignored": ([(A, 0.9, 0)], [(A, 0, True)], 0, 0, 0),
    "no objects": ([(A, 0.9, 0)], [], 0, 0, 0),
    "no detections": ([], [(A, 0, False)], 0, 0, 0),
    "nothing": ([], [], 0, 0, 0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_average_precision_by_hand(case):
    pytest.importorskip("faster_coco_eval")
    detections, truth, ap50, ap75, voc = BY_HAND[case]
    rubbish = part([(A, 0.99, 0), (C, 0.98, 1)], [(B, 0, False)], weight=0.0)
    for found in ([part(detections, truth)], [rubbish, part(detections, truth), rubbish]):
        answer = coco_ap(found)
        assert answer["AP50"] == pytest.approx(ap50, abs=1e-6)
        assert answer["AP75"] == pytest.approx(ap75, abs=1e-6)
        assert voc_ap50(found) == pytest.approx(voc, abs=1e-6)
    if case == "loosely":  # found at 0.5 and 0.55, and perhaps at 0.6, where it is a tie
        assert answer["mAP"] == pytest.approx((3 + 7 * 51 / 101) / 10, abs=0.06)


def random_found(seed):
    """Batches of jittered truth and of rubbish, with some ignored objects."""
    rng = np.random.default_rng(seed)
    for images in (5, 3):
        batch = random_batch(rng, images, rows=2 * images)
        picks = rng.integers(0, 2 * images, (images, 30))
        near = np.take_along_axis(batch["boxes"], picks[..., None], 1)
        yield {
            "boxes": np.clip(near + rng.normal(0, 0.03, near.shape), 0, 1).astype(np.float32),
            "scores": rng.uniform(0.01, 1, (images, 30)).astype(np.float32),
            "classes": np.where(
                rng.random((images, 30)) < 0.7,
                np.take_along_axis(batch["classes"], picks, 1),
                rng.integers(0, CLASSES, (images, 30)),
            ),
            "true_boxes": batch["boxes"],
            "true_classes": batch["classes"],
            "ignored": rng.random(batch["classes"].shape) < 0.2,
            "weight": np.arange(images) != 1,  # one that only fills up
        }


def images_of(found):
    """Each image's own detections and truth, without fill."""
    for batch in found:
        for i in np.flatnonzero(batch["weight"]):
            real, true = batch["classes"][i] >= 0, batch["true_classes"][i] >= 0
            detections = [batch[name][i][real] for name in ("boxes", "scores", "classes")]
            yield (
                detections,
                [batch[name][i][true] for name in ("true_boxes", "true_classes", "ignored")],
            )


@pytest.mark.parametrize("seed", range(3))
def test_coco_ap_is_pycocotools(seed):
    pytest.importorskip("faster_coco_eval")
    coco, cocoeval = (pytest.importorskip(f"pycocotools.{n}") for n in ("coco", "cocoeval"))
    found = list(random_found(seed))
    answers, annotations, count = [], [], 0
    for count, (detections, truth) in enumerate(images_of(found), 1):
        for box, score, label in zip(*detections, strict=True):
            x, y, x2, y2 = 1000 * box.astype(float)
            place = {"image_id": count, "bbox": [x, y, x2 - x, y2 - y]}
            answers.append(place | {"score": float(score), "category_id": int(label) + 1})
        for box, label, ignored in zip(*truth, strict=True):
            x, y, x2, y2 = 1000 * box.astype(float)
            place = {"image_id": count, "bbox": [x, y, x2 - x, y2 - y], "id": len(annotations) + 1}
            kind = {"category_id": int(label) + 1, "iscrowd": int(ignored)}
            annotations.append(place | kind | {"area": (x2 - x) * (y2 - y)})
    theirs = coco.COCO()
    theirs.dataset = {
        "info": {},
        "images": [{"id": i + 1} for i in range(count)],
        "categories": [{"id": c + 1} for c in range(CLASSES)],
        "annotations": annotations,
    }
    theirs.createIndex()
    run = cocoeval.COCOeval(theirs, theirs.loadRes(answers), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    answer = coco_ap(found)
    assert 0.1 < answer["mAP"] < 0.9
    expected = dict(zip(("mAP", "AP50", "AP75"), run.stats[:3], strict=True))
    assert answer == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_voc_ap50_is_the_development_kits_loop(seed):
    found = list(random_found(seed))
    images = list(images_of(found))
    each = []
    for label in range(CLASSES):
        detections = [
            (score, i, box)
            for i, ((boxes, scores, classes), _) in enumerate(images)
            for box, score, c in zip(boxes, scores, classes, strict=True)
            if c == label
        ]
        count = sum(np.sum((c == label) & ~ignored) for _, (_, c, ignored) in images)
        seen, hits, tried, curve = set(), 0, 0, []
        for _, i, box in sorted(detections, key=lambda d: -d[0]):
            objects, classes, ignored = images[i][1]
            shares = [
                intersection(box, o) * (c == label) for o, c in zip(objects, classes, strict=True)
            ]
            best = int(np.argmax(shares))
            if shares[best] >= 0.5 and ignored[best]:
                continue
            tried += 1
            if shares[best] >= 0.5 and (i, best) not in seen:
                seen.add((i, best))
                hits += 1
            curve.append((hits / count, hits / tried))
        recalls = [0.0, *(recall for recall, _ in curve)]
        best_beyond = [max(p for _, p in curve[k:]) for k in range(len(curve))]
        each.append(np.dot(np.diff(recalls), best_beyond))
    assert voc_ap50(found) == pytest.approx(np.mean(each), abs=1e-9)
    assert 0.1 < np.mean(each) < 0.9


# The whole


def summarised(task, *pairs):
    measure = jax.jit(task.measure)
    return task.summary([jax.tree.map(np.asarray, measure(out, b)) for out, b in pairs])


def test_right_answers_score_one():
    pytest.importorskip("faster_coco_eval")
    task, batch = Detection(CLASSES), random_batch(np.random.default_rng(7))
    answer = summarised(task, (right_outputs(batch), batch))
    assert answer["loss"] > 0  # of default boxes that overlap an object and are not its best
    for name in (task.metric, "AP50", "AP75", "VOC AP50"):
        assert answer[name] == pytest.approx(1)
    swapped = dict(batch, classes=np.where(batch["classes"] < 0, -1, 3 - batch["classes"]))
    assert summarised(task, (right_outputs(swapped), batch))["AP50"] < 0.1


def test_batches_and_their_fill_make_no_difference():
    pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(8)
    task, batch = Detection(CLASSES), random_batch(rng)
    outputs = right_outputs(batch)
    outputs["scores"] = outputs["scores"] / 8 + rng.normal(size=outputs["scores"].shape)
    outputs["offsets"] = outputs["offsets"] + 0.4 * rng.normal(size=outputs["offsets"].shape)
    whole = summarised(task, (outputs, batch))
    assert 0.05 < whole["mAP"] < 0.95

    def cut(x, place):
        return {k: v if v is DEFAULTS else v[np.array(place)] for k, v in x.items()}

    filled = dict(cut(batch, [1, 2, 2]), weight=np.array([1, 1, 0], np.float32))
    rest = dict(cut(batch, [0, 0, 0]), weight=np.array([0, 1, 0], np.float32))
    parts = summarised(task, (cut(outputs, [1, 2, 0]), filled), (cut(outputs, [1, 0, 2]), rest))
    assert parts == pytest.approx(whole, abs=1e-6)
    loss = jax.jit(task.loss)(outputs, batch)
    assert whole["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_an_untrained_model_and_an_empty_set_score_zero():
    pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(9)
    task, batch, outputs = Detection(CLASSES), random_batch(rng), random_outputs(rng)
    none = dict(batch, classes=np.full_like(batch["classes"], -1))
    assert summarised(task, (outputs, none))["mAP"] == 0
    sure = dict(outputs, scores=outputs["scores"] + 50 * jnp.eye(1 + CLASSES)[0])
    answer = summarised(task, (sure, batch))
    assert (answer["mAP"], answer["VOC AP50"]) == (0, 0)
    broken = dict(outputs, scores=outputs["scores"] * jnp.nan)
    assert summarised(task, (broken, batch))["mAP"] == 0


def test_half_precision_outputs_are_measured_in_single():
    rng = np.random.default_rng(10)
    batch, outputs = random_batch(rng), random_outputs(rng)
    half = {k: v if k == "boxes" else v.astype(jnp.bfloat16) for k, v in outputs.items()}
    loss = jax.jit(Detection(CLASSES).loss)
    assert loss(half, batch).dtype == jnp.float32
    close(loss(half, batch), loss(outputs, batch), 1e-2)
    assert jax.eval_shape(detect, half)["boxes"].dtype == jnp.float32


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(DiscoError, match=r"faster-coco-eval"):
        coco_ap([part([], [])])
