"""What it takes no network to reach on the sets of ``prepare_data.py``: the least a network owes.

    python experiments/trivial.py --data=data

Segmentation: the commonest class everywhere, and for each pixel the best class of its colour alone
(logistic regression on colour and its squares, trained on a hundred thousand training pixels).
Super-resolution: bicubic enlargement. Detection: what a detector of random answers reaches is 0;
instead the boxes of all training objects' mean place and size, with the classes' frequencies as
scores. Test split, with the tasks' own metrics.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from disco_jax.data import sources
from disco_jax.data.imresize import imresize
from disco_jax.data.pipeline import evaluation_batches
from disco_jax.data.preprocess import Preprocess
from disco_jax.tasks import Detection, Segmentation, SuperResolution, Task
from disco_jax.tasks.boxes import encode

RESULTS = Path(__file__).parent / "results" / "trivial.json"
GREY = ((0.0,) * 3, (1.0,) * 3)  # mean and std that leave colours as they are


def measure(task: Task, source: str, preprocess: Preprocess, answer: Callable[[Any], Any]) -> Any:
    found = [
        jax.device_get(task.measure(answer(batch["image"]), jax.tree.map(jnp.asarray, batch)))
        for batch in evaluation_batches(sources.load(source, "test"), preprocess, 1)
    ]
    return {k: round(v, 4) for k, v in task.summary(found).items() if k != "loss"}


def land(source: str) -> dict[str, Any]:
    train, rng = sources.load(source, "train"), np.random.default_rng(0)
    preprocess, task = Preprocess(0, (), *GREY), Segmentation(train.num_classes)
    colours, classes = [], []
    for i in range(len(train)):
        example = preprocess(train[i], rng)
        chosen = rng.integers(example["mask"].size, size=140)
        colours.append(example["image"].reshape(-1, 3)[chosen])
        classes.append(example["mask"].reshape(-1)[chosen])
    x, y = np.concatenate(colours), np.concatenate(classes)
    x, y = x[y != task.ignore], y[y != task.ignore]
    commonest = np.bincount(y).argmax()
    pipeline = make_pipeline(
        PolynomialFeatures(2), StandardScaler(), LogisticRegression(max_iter=300)
    ).fit(x, y)

    def logits(classes: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
        return jax.nn.one_hot(classes.reshape(shape[:-1]), task.num_classes)

    return {
        "commonest class": measure(
            task, source, preprocess, lambda x: logits(np.full(x.size // 3, commonest), x.shape)
        ),
        "colour alone": measure(
            task, source, preprocess, lambda x: logits(pipeline.predict(x.reshape(-1, 3)), x.shape)
        ),
    }


def photos(source: str, scale: int) -> dict[str, Any]:
    task, preprocess = SuperResolution(scale, *GREY), Preprocess(0, ("degrade",), *GREY, scale)

    def bicubic(images: np.ndarray) -> jax.Array:
        pixels = np.round(255 * images[0]).astype(np.uint8)
        return jnp.asarray(imresize(pixels, scale)[None] / 255, jnp.float32)

    return {"bicubic": measure(task, source, preprocess, bicubic)}


def scenes(source: str) -> dict[str, Any]:
    train = sources.load(source, "train")
    task, preprocess = Detection(train.num_classes), Preprocess(0, (), *GREY)
    boxes = np.concatenate([o.boxes for o in train.objects])
    count = Counter(np.concatenate([o.classes for o in train.objects]).tolist())
    shares = np.array([count[c] for c in range(train.num_classes)]) / len(boxes)
    mean = jnp.asarray(boxes.mean(0)[None])
    answer = {
        "scores": jnp.log(jnp.asarray([[[0.5, *shares / 2]]])),
        "offsets": encode(mean, mean)[None],
        "boxes": mean,
    }
    return {"mean box": measure(task, source, preprocess, lambda _: answer)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args()
    found = {
        "land": land(f"masks:{args.data}/land"),
        "photos": photos(f"photos:{args.data}/photos", 2),
        "scenes": scenes(f"coco:{args.data}/scenes"),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
