"""Latency of one image over a slow link: ResNet-50 on two hosts of one core each.

    sudo python experiments/link_latency.py [--rates 10 30 100 300 1000] [--iterations=20]

Linux and root: the hosts are network namespaces, see ``slow_link.py``. All programs are loaded in
the same processes and take turns, so that ratios of one line are ratios within one run. Accuracy
plays no part here: the weights are random, the masks of random scores; what a mask costs depends on
its size alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import slow_link

RESULTS = Path(__file__).parent / "results" / "link_latency.jsonl"
SIZE = 224
ANSWER = "answer "
BY_STAGE = [
    (r"blocks\.[012]\.", 0.05),
    (r"blocks\.[3-6]\.", 0.1),
    (r"blocks\.([789]|1[012])\.", 0.3),
]
WAYS: dict[str, dict[str, Any]] = {
    "dense float32": {"density": 1.0},
    "0.2 float32": {"density": 0.2},
    "0.2 int8": {"density": 0.2, "wire_dtype": "int8"},
    "by stage int8": {
        "density": 0.5,
        "rules": [(pattern, {"density": d}) for pattern, d in BY_STAGE],
        "wire_dtype": "int8",
    },
}


def programs(nodes: int, size: int) -> dict[str, tuple[Callable, int]]:
    """What takes turns: a function of no arguments that waits for its result, and its bytes."""
    import jax
    from flax import nnx

    import disco_jax as dj

    image = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)

    def create(mesh: dj.NodeMesh) -> nnx.Module:
        return dj.models.create("resnet50", mesh=mesh, num_classes=1000, rngs=nnx.Rngs(0))

    found = {}
    for name, way in WAYS.items():
        options = dict(way)
        wire_dtype = options.pop("wire_dtype", "float32")
        model = create(dj.NodeMesh(nodes, emulate=True, devices=jax.local_devices()))
        if options["density"] < 1:
            dj.sparsify.prune(model, score="random", **options)
        frozen = dj.freeze(model, image, wire_dtype=wire_dtype, mesh=dj.NodeMesh(nodes))
        found[name] = (lambda f=frozen: jax.block_until_ready(f(image)), frozen.plan.traffic_bytes)
    alone = dj.plan.Program(create(dj.NodeMesh(1, devices=jax.local_devices())))
    if jax.process_index() == 0:
        found["one host"] = (lambda: jax.block_until_ready(alone(image)), 0)
    else:
        found["one host"] = (lambda: None, 0)
    return found


def host(args: argparse.Namespace) -> None:
    """One host: runs what it is told on stdin, and answers with seconds."""
    from disco_jax import runtime

    with runtime.connect(f"{slow_link.address(0)}:9876", args.nodes, args.host):
        found = programs(args.nodes, args.size)
        for run, _ in found.values():
            run()
        print(ANSWER + json.dumps({name: count for name, (_, count) in found.items()}), flush=True)
        for line in sys.stdin:
            name, iterations = json.loads(line)
            run, _ = found[name]
            seconds = []
            for _ in range(iterations):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            print(ANSWER + json.dumps(seconds), flush=True)


class Hosts:
    """The processes, which all do the same."""

    def __init__(self, nodes: int, size: int):
        command = [sys.executable, __file__, f"--nodes={nodes}", f"--size={size}"]
        self.running = [slow_link.start(i, i % 2, [*command, f"--host={i}"]) for i in range(nodes)]
        self.bytes = self._answer()

    def _answer(self) -> Any:
        # gloo prints to stdout as well
        answers = [next((x for x in r.stdout if x.startswith(ANSWER)), "") for r in self.running]
        if not all(answers):
            raise SystemExit("a host ended; see its message above")
        return json.loads(answers[0].removeprefix(ANSWER))

    def time(self, name: str, iterations: int) -> list[float]:
        """Seconds of each run, at node 0, where the result is."""
        for running in self.running:
            running.stdin.write(json.dumps([name, iterations]) + "\n")
            running.stdin.flush()
        return self._answer()

    def close(self) -> None:
        for running in self.running:
            running.stdin.close()
        for running in self.running:
            running.wait(60)


def measure(hosts: Hosts, rounds: int, each: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in hosts.bytes}
    sent: dict[str, int] = dict.fromkeys(hosts.bytes, 0)
    for _ in range(rounds):
        for name in hosts.bytes:
            hosts.time(name, 1)  # what the one before left behind
            before = sum(slow_link.bytes_sent(i) for i in range(len(hosts.running)))
            seconds[name] += hosts.time(name, each)
            sent[name] += sum(slow_link.bytes_sent(i) for i in range(len(hosts.running))) - before
    return {
        name: {
            "ms": round(1e3 * statistics.median(times), 2),
            "plan_bytes": hosts.bytes[name],
            "wire_bytes": round(sent[name] / len(times)),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[1000, 300, 100, 30, 10])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.host is not None:
        host(args)
        return
    with slow_link.hosts(args.nodes):
        hosts = Hosts(args.nodes, args.size)
        for rate in args.rates:
            slow_link.limit(args.nodes, rate)
            found = measure(hosts, rounds=4, each=max(1, args.iterations // 4))
            row = {"nodes": args.nodes, "size": args.size, "mbit": rate, "ways": found}
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name, figures in found.items():
                print(f"{rate:6g} Mbit/s  {name:16s} {figures}", flush=True)
        hosts.close()


if __name__ == "__main__":
    main()
