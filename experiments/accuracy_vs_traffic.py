"""Accuracy against traffic: every way of choosing what to send, at the same fine-tuning budget.

    python experiments/accuracy_vs_traffic.py --quick        # digits, a few minutes, one seed
    python experiments/accuracy_vs_traffic.py                # Fashion-MNIST; a night on two cores
    python experiments/accuracy_vs_traffic.py --model=vit_micro
    python experiments/prepare_data.py --out=data            # then deeplab, ssd or edsr
    python experiments/accuracy_vs_traffic.py --model=deeplab --data=data
    python experiments/accuracy_figure.py                    # table and figure of what is there

ResNet-20, or a small vision transformer (6 blocks of width 64, patches of 7x7 pixels), on
Fashion-MNIST (Debian package dataset-fashion-mnist); DeepLabV3, SSD and EDSR on the sets of
``prepare_data.py``, whose rows have mIoU, mAP (in %) or PSNR (in dB) for accuracy. A dense network
of each width and seed is trained once; every method starts from its weights, fine-tunes for the
same number of epochs (one for the ResNet of width 16, which takes three times as long, two for the
other one and the transformer, what the config says for the others), and may look at the training
and validation images only. The test accuracy is measured once, of the frozen model, at the end of a
run. Traffic is that of its plan, fill included, against the dense split in float32.
One JSON line per run is appended to ``results/accuracy_vs_traffic.jsonl``; runs that are there are
not done again, and an interrupted run goes on from its checkpoint. Start the script once for each
core, with ``--share=0/2`` and ``--share=1/2``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from accuracy_figure import read, show
from flax import nnx
from methods import METHODS, PARTS, ROWS
from ml_collections import ConfigDict

from disco_jax import NodeMesh, cost, models, plan, sparsify, wire
from disco_jax.data import sources
from disco_jax.interop import pretrained
from disco_jax.job import Job

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "accuracy_vs_traffic.jsonl"
DENSE_PREDICTION = HERE / "results" / "dense_prediction.jsonl"
DENSE = HERE / "results" / "dense"  # weights from earlier nights, so that these go on


@dataclasses.dataclass(frozen=True)
class Network:
    """What is trained, and how it is fine-tuned; None: as the config says."""

    config: str  # file and variant
    widths: tuple[int, ...]
    nodes: tuple[int, ...] = (4, 2)
    times_less: tuple[int, ...] = (5, 20)
    methods: tuple[str, ...] = ("dense", "none", "random", "uniform l2", "int8", "best")
    epochs: dict[int, float] | None = None  # by width
    rate: float | None = None
    source: str | None = None  # within --data


TASKS = ("dense", "none", "random", "uniform l2", "best", "in training")
NETWORKS = {
    "resnet20": Network(
        "resnet20_fashion_mnist:full",
        (8, 16),
        methods=tuple(m for m, c in METHODS.items() if not c.keys() & PARTS.keys() and c != ROWS),
        epochs={8: 2.0, 16: 1.0},
        rate=0.05,
    ),
    "vit_micro": Network("vit_fashion_mnist", (64,), epochs={64: 2.0}, rate=5e-4),
    "deeplab": Network("deeplab:land", (16,), (2,), (5,), TASKS, source="masks:{}/land"),
    "ssd": Network("ssd:stamps", (16,), (2,), (5,), TASKS, source="coco:{}/scenes"),
    "edsr": Network(
        "edsr:photos",
        (16,),
        (2,),
        (5,),
        ("dense", "none", "random", "uniform l2", "parts in training", "rows"),
        source="photos:{}/photos",
    ),
}
QUICK = {
    "widths": [8],
    "nodes": [4],
    "times_less": [5],
    "seeds": [0],
    "methods": ["dense", "none", "random", "uniform l2", "all", "best", "best post-training"],
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One line of the grid. ``times_less`` is the traffic of dense over the budget."""

    width: int
    nodes: int
    seed: int
    method: str
    times_less: int
    model: str = "resnet20"

    @property
    def name(self) -> str:
        method = self.method.replace(" ", "_")
        return f"{self.model}-w{self.width}-n{self.nodes}-s{self.seed}-{method}-{self.times_less}x"


def base_config(args: argparse.Namespace, width: int, seed: int) -> ConfigDict:
    network = NETWORKS[args.model]
    name, _, variant = network.config.partition(":")
    spec = importlib.util.spec_from_file_location("config", HERE.parent / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(*filter(None, [variant]))
    c.seed, c.emulate = seed, True
    if args.model == "resnet20":
        c.dense.update(epochs=6.0, learning_rate=0.1)
    if args.model == "vit_micro":
        c.model.update(patch=7)
    else:
        c.model.width = width
    if network.source:
        c.data.source = network.source.format(args.data)
    if args.quick:
        c.data.source, c.data.size = "digits", c.model.get("image_size", 16)
        c.batch_size, c.eval_batch_size = 32, 120
    return c


def dense_weights(args: argparse.Namespace, width: int, seed: int) -> Path:
    """Trains the dense network of a width and seed, once."""
    of = "" if args.model in ("resnet20", "vit_micro") else f"-{args.model}"
    known = DENSE / f"dense{of}-w{width}-s{seed}.safetensors"
    path = known if known.exists() and not args.quick else args.work / known.name
    if not path.exists():
        c = base_config(args, width, seed)
        c.nodes = 1
        job = Job(c, args.work / path.stem)
        job.train("dense")
        pretrained.save(job.model, path)
    return path


def config_of(run: Run, args: argparse.Namespace) -> ConfigDict:
    c, network = base_config(args, run.width, run.seed), NETWORKS[run.model]
    c.name, c.nodes = run.name, run.nodes
    c.dense.weights = str(dense_weights(args, run.width, run.seed))
    c.optimizer.warmup_epochs = 0.1
    c.sparse.update(every=20, mask_share=0.25)
    if network.epochs is not None:
        c.sparse.update(epochs=network.epochs[run.width], learning_rate=network.rate)
    changes = dict(METHODS[run.method])
    for key in ("planned", "trained"):  # say how, not what
        changes.pop(key, None)
    c.wire_dtype = changes.pop("wire_dtype", "float32")
    c.rows, c.row_dtype = changes.pop("rows", ()), changes.pop("row_dtype", None)
    with c.unlocked():
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            {"": c.sparse, "distill": c.sparse.distill, "model": c.model}[section][name] = value
    c.sparse.density = 1.0 if run.method == "dense" else density(run, c, dense_traffic(run, args))
    return c


def density(run: Run, config: ConfigDict, dense: int) -> float:
    """That meets the budget: what no mask thins (norms, results, rows) comes first."""
    factor = 32 / wire.BITS[config.wire_dtype]
    if run.model == "resnet20" and not config.rows:
        return min(1.0, factor / run.times_less)  # its logits are a five-thousandth at most
    thinned = whole = 0.0
    for e in dense_plan(config).exchanges:
        sent, own = e.traffic_bytes(run.nodes), 0.0
        if e.split == "rows to channels":  # a node is given rows of its own channels as well
            own = sent / run.nodes
        masked = not e.gathered and e.split in ("channels", "rows to channels")
        whole += own / factor if masked else sent
        thinned += sent - own if masked else 0
    if thinned == 0:
        return 1.0
    return float(np.clip(factor * (dense / run.times_less - whole) / thinned, 0, 1))


def dense_traffic(run: Run, args: argparse.Namespace) -> int:
    """Bytes of the dense split of the network as it is, whatever a method makes of it."""
    config = base_config(args, run.width, run.seed)
    config.nodes = run.nodes
    return dense_plan(config).dense_traffic_bytes


def dense_plan(config: ConfigDict) -> plan.CommunicationPlan:
    mesh = NodeMesh(config.nodes, emulate=True)
    classes = sources.load(config.data.source, "train").num_classes
    options = {**config.model, **({"num_classes": classes} if classes else {})}
    model = models.create(mesh=mesh, rngs=nnx.Rngs(0), **options)
    size = config.data.size
    images = jax.ShapeDtypeStruct((1, size, size, len(config.data.mean)), np.float32)
    if config.rows:
        plan.split(model, images, config.rows, wire_dtype=config.row_dtype)
    return plan.freeze(model, images).plan


def planned(run: Run, config: ConfigDict, folder: Path, dense: int) -> ConfigDict:
    """The config with a density and a wire dtype for every exchange, for the run's traffic."""
    job = Job(config, folder)
    job.train("dense")
    images = np.concatenate(list(job.calibration()))
    sparsify.assign(job.model, images)
    link = cost.Link(mbit=8, ms=0)  # a millisecond for every 1000 bytes that a node sends
    ms = dense / run.times_less / run.nodes / 1e3
    limits = {"minimise": "loss", "ms": ms, "rows": False, "wire_dtypes": ("int4", "int8")}
    found = cost.plan_splits(job.model, images, link, gmacs=1e9, **limits)
    config.sparse.rules, config.wire_rules = found.rules, found.wire_rules
    config.wire_dtype = None
    return config


def execute(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    folder, config = args.work / run.name, config_of(run, args)
    dense = dense_traffic(run, args)
    if METHODS[run.method].get("planned"):
        config = planned(run, config, folder, dense)
    job = Job(config, folder)
    start = time.perf_counter()
    job.train("dense")
    if not METHODS[run.method].get("trained", True):
        sparsify.prune(job.model, job.config.sparse.density, costs=job.recipe.costs)
    else:
        job.learn()
    seconds = time.perf_counter() - start
    frozen = job.freeze()
    # Masked and packed are the same numbers, and masked is faster; rounding is in the packed only.
    rounds = any(map(wire.calibrated, job.recipe.wires.values()))
    program = frozen if rounds else plan.Program(job.model)
    unit = 100 if job.task.unit == "%" else 1
    row = {
        **dataclasses.asdict(run),
        "traffic": frozen.plan.traffic_bytes,
        "dense_traffic": dense,
        "exchanges": sum(bool(e.hops) for e in frozen.plan.exchanges),
        "validation": round(unit * job.validate(program), 3),
        "test": round(unit * job.test(program), 3),
        "seconds": round(seconds),
    }
    shutil.rmtree(folder)
    return row


def grid(args: argparse.Namespace) -> list[Run]:
    """All runs, the seeds of one comparison after each other."""
    runs = [
        Run(width, nodes, seed, method, times, args.model)
        for width, nodes, times, method, seed in itertools.product(
            args.widths, args.nodes, args.times_less, args.methods, args.seeds
        )
    ]
    # What has no budget is run once.
    once = ("dense", "none")
    return [r for r in runs if r.method not in once or r.times_less == args.times_less[0]]


def done(row: dict[str, Any]) -> Run:
    return Run(**{f.name: row[f.name] for f in dataclasses.fields(Run) if f.name in row})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="digits, one seed, few methods")
    parser.add_argument("--out", type=Path, help="JSON lines; --quick keeps them in --work")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy_vs_traffic"))
    parser.add_argument("--share", default="0/1", help="i/n: every n-th run, from the i-th")
    parser.add_argument("--data", type=Path, default=Path("data"), help="of prepare_data.py")
    parser.add_argument("--model", choices=NETWORKS, default="resnet20")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    known, _ = parser.parse_known_args()
    for name, kind in (("widths", int), ("nodes", int), ("times_less", int), ("methods", str)):
        values = getattr(NETWORKS[known.model], name)
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=values)
    if known.quick:
        parser.set_defaults(**QUICK, work=Path("runs/accuracy_vs_traffic_quick"))
    args = parser.parse_args()
    results = DENSE_PREDICTION if NETWORKS[args.model].source else RESULTS
    args.out = args.out or (args.work / RESULTS.name if args.quick else results)
    args.work.mkdir(parents=True, exist_ok=True)
    share, of = map(int, args.share.split("/"))
    for run in grid(args)[share::of]:
        if run not in map(done, read(args.out)):
            row = execute(run, args)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    show(read(args.out))


if __name__ == "__main__":
    main()
