"""Accuracy against traffic: every way of choosing what to send, at the same fine-tuning budget.

    python experiments/accuracy_vs_traffic.py --quick        # digits, a few minutes, one seed
    python experiments/accuracy_vs_traffic.py                # Fashion-MNIST; a night on two cores
    python experiments/accuracy_figure.py                    # table and figure of what is there

ResNet-20 on Fashion-MNIST (Debian package dataset-fashion-mnist). A dense network of each width and
seed is trained once; every method starts from its weights, fine-tunes for the same number of
epochs (two at width 8, one at width 16, which takes three times as long), and may look at the
training and validation images only. The test accuracy is measured once, of the frozen model, at the
end of a run. Traffic is that of its plan, fill included, against the dense split in float32. One
JSON line per run is appended to ``results/accuracy_vs_traffic.jsonl``; runs that are there are not
done again, and an interrupted run goes on from its checkpoint. Start the script once for each core,
with ``--share=0/2`` and ``--share=1/2``.
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

import numpy as np
from accuracy_figure import read, show
from ml_collections import ConfigDict

from disco_jax import cost, plan, sparsify, wire
from disco_jax.interop import pretrained
from disco_jax.job import Job

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "accuracy_vs_traffic.jsonl"
DENSE = HERE / "results" / "dense"  # weights from earlier nights, so that these go on
CONFIG = HERE.parent / "configs" / "resnet20_fashion_mnist.py"

EPOCHS = {8: 2.0, 16: 1.0}  # of fine-tuning
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

    @property
    def name(self) -> str:
        method = self.method.replace(" ", "_")
        return f"w{self.width}-n{self.nodes}-s{self.seed}-{method}-{self.times_less}x"


def base_config(width: int, seed: int, quick: bool) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.model.width, c.seed, c.emulate = width, seed, True
    c.dense.update(epochs=6.0, learning_rate=0.1)
    if quick:
        c.data.source, c.data.size, c.batch_size, c.eval_batch_size = "digits", 16, 32, 120
    return c


def dense_weights(width: int, seed: int, quick: bool, work: Path) -> Path:
    """Trains the dense network of a width and seed, once."""
    known = DENSE / f"dense-w{width}-s{seed}.safetensors"
    path = known if known.exists() and not quick else work / known.name
    if not path.exists():
        c = base_config(width, seed, quick)
        c.nodes = 1
        job = Job(c, work / f"dense-w{width}-s{seed}")
        job.train("dense")
        pretrained.save(job.model, path)
    return path


def config_of(run: Run, quick: bool, work: Path) -> ConfigDict:
    c = base_config(run.width, run.seed, quick)
    c.name, c.nodes = run.name, run.nodes
    c.dense.weights = str(dense_weights(run.width, run.seed, quick, work))
    c.optimizer.warmup_epochs = 0.1
    c.sparse.update(epochs=EPOCHS[run.width], learning_rate=0.05, every=20, mask_share=0.25)
    changes = dict(METHODS[run.method])
    changes.pop("planned", None)
    c.wire_dtype = changes.pop("wire_dtype", "float32")
    density = 32 / wire.BITS[c.wire_dtype] / run.times_less
    c.sparse.density = 1.0 if run.method == "dense" else min(1.0, density)
    with c.sparse.unlocked():
        for key, value in changes.items():
            section, _, name = ("sparse." + key).rpartition(".")
            (c.sparse if section == "sparse" else c.sparse.distill)[name] = value
    return c


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
        Run(width, nodes, seed, method, times)
        for width, nodes, times, method, seed in itertools.product(
            args.widths, args.nodes, args.times_less, args.methods, args.seeds
        )
    ]
    # What has no budget is run once.
    once = ("dense", "none")
    return [r for r in runs if r.method not in once or r.times_less == args.times_less[0]]


def done(row: dict[str, Any]) -> Run:
    return Run(**{f.name: row[f.name] for f in dataclasses.fields(Run)})


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
    quick, _ = parser.parse_known_args()
    if quick.quick:
        parser.set_defaults(**QUICK, work=Path("runs/accuracy_vs_traffic_quick"))
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
