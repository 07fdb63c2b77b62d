"""Accuracy against traffic: every way of choosing what to send, at the same fine-tuning budget.

    python experiments/accuracy_vs_traffic.py --quick        # digits, a few minutes, one seed
    python experiments/accuracy_vs_traffic.py                # Fashion-MNIST; a night on two cores
    python experiments/accuracy_vs_traffic.py --model=vit_micro
    python experiments/accuracy_figure.py                    # table and figure of what is there

ResNet-20, or a small vision transformer (6 blocks of width 64, patches of 7x7 pixels), on
Fashion-MNIST (Debian package dataset-fashion-mnist). A dense network of each width and seed is
trained once; every method starts from its weights, fine-tunes for the same number of epochs (one
for the ResNet of width 16, which takes three times as long, and two for the others), and may look
at the training and validation images only. The test accuracy is measured once, of the frozen model,
at the end of a run. Traffic is that of its plan, fill included, against the dense split in float32.
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
from ml_collections import ConfigDict

from disco_jax import NodeMesh, cost, models, plan, sparsify, wire
from disco_jax.interop import pretrained
from disco_jax.job import Job

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "accuracy_vs_traffic.jsonl"
DENSE = HERE / "results" / "dense"  # weights from earlier nights, so that these go on
CONFIGS = {"resnet20": "resnet20_fashion_mnist", "vit_micro": "vit_fashion_mnist"}
EPOCHS = {8: 2.0, 16: 1.0, 64: 2.0}  # of fine-tuning, by width
RATES = {"resnet20": 0.05, "vit_micro": 5e-4}  # of fine-tuning
VIT = {
    "widths": [64],
    "methods": ["dense", "none", "random", "uniform l2", "int8", "best"],
}
ASSIGN = {"assignment": "local"}
BY_COST = {"budget": "by_cost", "floor": 0.3}
DISTILL = {"distill.weight": 0.9, "distill.features": 1.0}
GATES = {"gates": "hard_concrete"}
REGROW = {"regrow": "gradient"}
ALL = {**ASSIGN, **BY_COST, **DISTILL}
INT8 = {"wire_dtype": "int8"}  # four times the channels for the same bytes
INT4 = {"wire_dtype": "int4", "quantise": True}  # eight times, with rounding in training
# What each method changes in the `sparse` section of the config.
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "none": {"score": "none"},
    "random": {"score": "random", "schedule": "constant"},
    "uniform l2": {},
    "best": {**ASSIGN, **BY_COST, **INT8, "distill.weight": 0.5},
    # What each part adds, alone and together.
    "all": ALL,
    "assigned": ASSIGN,
    "by cost": BY_COST,
    "gates": GATES,
    "regrown": REGROW,
    "distilled": DISTILL,
    "int8": INT8,
    "int8 + assigned + by cost": {**ASSIGN, **BY_COST, **INT8},
    "all + int8": {**ALL, **INT8},
    "int8 in training": {**INT8, "quantise": True},
    "int4": INT4,
    # Densities and wire dtypes as `cost.plan_latency` chooses them.
    "planned": {**ASSIGN, "quantise": True, "distill.weight": 0.5, "planned": True},
    "best int4": {**ASSIGN, **BY_COST, **INT4, "distill.weight": 0.5},
    "all but assigned": {**BY_COST, **DISTILL},
    "all but by cost": {**ASSIGN, **DISTILL},
    "all but distilled": {**ASSIGN, **BY_COST},
    "all + regrown": {**ALL, **REGROW},
    "all + gates": {**ASSIGN, **DISTILL, **GATES},
    # Without labels or training.
    "one-shot": {},
    "post-training": {"post_training": True, **ASSIGN, **BY_COST},
    "best post-training": {"post_training": True, **ASSIGN, **BY_COST, **INT8},
    # Other choices.
    "uniform l1": {"score": "l1"},
    "taylor": {"score": "taylor"},
    "activation": {"score": "activation"},
    "reconstruction": {"score": "reconstruction"},
    "feedback": {"regrow": "feedback"},
    "lasso": {"lasso": 1e-3},
    "straight through": {"gates": "straight_through"},
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
        return f"w{self.width}-n{self.nodes}-s{self.seed}-{method}-{self.times_less}x"


def base_config(model: str, width: int, seed: int, quick: bool) -> ConfigDict:
    path = HERE.parent / "configs" / f"{CONFIGS[model]}.py"
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.seed, c.emulate = seed, True
    if model == "resnet20":
        c.model.width = width
        c.dense.update(epochs=6.0, learning_rate=0.1)
    else:
        c.model.update(patch=7)
    if quick:
        c.data.source, c.data.size = "digits", c.model.get("image_size", 16)
        c.batch_size, c.eval_batch_size = 32, 120
    return c


def dense_weights(model: str, width: int, seed: int, quick: bool, work: Path) -> Path:
    """Trains the dense network of a width and seed, once."""
    known = DENSE / f"dense-w{width}-s{seed}.safetensors"
    path = known if known.exists() and not quick else work / known.name
    if not path.exists():
        c = base_config(model, width, seed, quick)
        c.nodes = 1
        job = Job(c, work / f"dense-w{width}-s{seed}")
        job.train("dense")
        pretrained.save(job.model, path)
    return path


def config_of(run: Run, quick: bool, work: Path) -> ConfigDict:
    c = base_config(run.model, run.width, run.seed, quick)
    c.name, c.nodes = run.name, run.nodes
    c.dense.weights = str(dense_weights(run.model, run.width, run.seed, quick, work))
    c.optimizer.warmup_epochs = 0.1
    rate = RATES[run.model]
    c.sparse.update(epochs=EPOCHS[run.width], learning_rate=rate, every=20, mask_share=0.25)
    changes = dict(METHODS[run.method])
    changes.pop("planned", None)
    c.wire_dtype = changes.pop("wire_dtype", "float32")
    # What no mask thins of a ResNet are its logits, a five-thousandth at most.
    whole = statistics(c) if run.model == "vit_micro" else 0.0
    density = 32 / wire.BITS[c.wire_dtype] * (1 / run.times_less - whole) / (1 - whole)
    c.sparse.density = 1.0 if run.method == "dense" else min(1.0, density)
    with c.sparse.unlocked():
        for key, value in changes.items():
            section, _, name = ("sparse." + key).rpartition(".")
            (c.sparse if section == "sparse" else c.sparse.distill)[name] = value
    return c


def statistics(config: ConfigDict) -> float:
    """Share of the dense traffic that no mask thins: what layer norms tell each other."""
    mesh = NodeMesh(config.nodes, emulate=True)
    model = models.create(mesh=mesh, num_classes=10, rngs=nnx.Rngs(0), **config.model)
    size = config.data.size
    images = jax.ShapeDtypeStruct((1, size, size, config.model.in_channels), np.float32)
    found = plan.freeze(model, images).plan
    whole = sum(e.traffic_bytes(found.nodes) for e in found.exchanges if e.gathered)
    return whole / found.dense_traffic_bytes


def planned(run: Run, config: ConfigDict, folder: Path) -> ConfigDict:
    """The config with a density and a wire dtype for every exchange, for the run's traffic."""
    job = Job(config, folder)
    job.train("dense")
    images = np.concatenate(list(job.calibration()))
    sparsify.assign(job.model, images)
    dense = plan.freeze(job.model, job.images).plan.dense_traffic_bytes
    link = cost.Link(mbit=8, ms=0)  # a millisecond for every 1000 bytes that a node sends
    ms = dense / run.times_less / run.nodes / 1e3
    found = cost.plan_latency(job.model, images, ms, link, gmacs=1e9, wire_dtypes=("int4", "int8"))
    config.sparse.rules, config.wire_rules = found.rules, found.wire_rules
    config.wire_dtype = None
    return config


def execute(run: Run, quick: bool, work: Path) -> dict[str, Any]:
    folder, config = work / run.name, config_of(run, quick, work)
    if METHODS[run.method].get("planned"):
        config = planned(run, config, folder)
    job = Job(config, folder)
    start = time.perf_counter()
    job.train("dense")
    if run.method == "one-shot":
        sparsify.prune(job.model, job.config.sparse.density, costs=job.recipe.costs)
    else:
        job.learn()
    seconds = time.perf_counter() - start
    frozen = job.freeze()
    # Masked and packed are the same numbers, and masked is faster; rounding is in the packed only.
    rounds = any(map(wire.calibrated, job.recipe.wires.values()))
    program = frozen if rounds else plan.Program(job.model)
    row = {
        **dataclasses.asdict(run),
        "traffic": frozen.plan.traffic_bytes,
        "dense_traffic": frozen.plan.dense_traffic_bytes,
        "exchanges": sum(bool(e.hops) for e in frozen.plan.exchanges),
        "validation": round(100 * job.validate(program), 3),
        "test": round(100 * job.test(program), 3),
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
    for name, kind, values in (
        ("widths", int, [8, 16]),
        ("nodes", int, [4, 2]),
        ("times_less", int, [5, 20]),
        ("seeds", int, [0, 1, 2]),
        ("methods", str, list(METHODS)),
    ):
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=values)
    parser.add_argument("--model", choices=CONFIGS, default="resnet20")
    known, _ = parser.parse_known_args()
    if known.quick:
        parser.set_defaults(**QUICK, work=Path("runs/accuracy_vs_traffic_quick"))
    if known.model == "vit_micro":
        parser.set_defaults(**VIT)
    args = parser.parse_args()
    args.out = args.out or (args.work / RESULTS.name if args.quick else RESULTS)
    args.work.mkdir(parents=True, exist_ok=True)
    share, of = map(int, args.share.split("/"))
    for run in grid(args)[share::of]:
        if run not in map(done, read(args.out)):
            row = execute(run, args.quick, args.work)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    show(read(args.out))


if __name__ == "__main__":
    main()
