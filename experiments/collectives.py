"""N-1 ``ppermute``s against one ``all_to_all`` or ``all_gather`` where nodes send equally much.

And against permutes in pieces of 100 kB, as ``freeze(message_bytes=100_000)`` makes them.

    sudo python experiments/collectives.py --nodes=4 --rates 100 1000

Linux and root; hosts are network namespaces, see ``slow_link.py``. Median time of 30 rounds, which
take turns, for messages of several sizes to every other node. One JSON line per rate is appended to
``results/collectives.jsonl``.
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

RESULTS = Path(__file__).parent / "results" / "collectives.jsonl"
SIZES = (64, 4_000, 25_000, 100_000, 400_000)  # bytes from each node to each other one
ROUNDS = 30


def ways(mesh: Any, size: int) -> dict[str, Callable[[], Any]]:
    """Ways to send ``size`` bytes from every node to every other; to all the same in the last."""
    import jax
    from jax import lax
    from jax.sharding import PartitionSpec as P

    from disco_jax.mesh import NODE

    n = mesh.nodes

    def permutes(x: Any) -> Any:
        hops = [[(s, (s + k) % n) for s in range(n)] for k in range(1, n)]
        return jax.numpy.concatenate([x[:1]] + [lax.ppermute(x[:1], NODE, hop) for hop in hops])

    def pieces(x: Any) -> Any:
        parts = [permutes(x[:, i : i + 100_000]) for i in range(0, size, 100_000)]
        return jax.numpy.concatenate(parts, 1)

    def all_to_all(x: Any) -> Any:
        return lax.all_to_all(x, NODE, 0, 0, tiled=True)

    def all_gather(x: Any) -> Any:
        return lax.all_gather(x[:1], NODE, axis=0, tiled=True)

    x = mesh.put(np.zeros((n * n, size), np.int8), NODE)
    found = {}
    for fn in (permutes, pieces, all_to_all, all_gather):
        run = jax.jit(
            jax.shard_map(fn, mesh=mesh.jax_mesh, in_specs=P(NODE), out_specs=P(NODE))  # [n, size]
        )
        found[fn.__name__] = lambda run=run: jax.block_until_ready(run(x))
    return found


def host(args: argparse.Namespace) -> None:
    from disco_jax import NodeMesh, runtime

    with runtime.connect(f"{slow_link.address(0)}:9870", args.nodes, args.host):
        runs = {size: ways(NodeMesh(args.nodes), size) for size in SIZES}
        for _ in sys.stdin:
            found = {}
            for size, both in runs.items():
                times: dict[str, list[float]] = {name: [] for name in both}
                for i in range(ROUNDS + 2):
                    for name, run in both.items():
                        start = time.perf_counter()
                        run()
                        times[name] += [1e3 * (time.perf_counter() - start)] * (i >= 2)
                found[size] = {k: round(statistics.median(v), 3) for k, v in times.items()}
            print("answer " + json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 1000])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.host is not None:
        host(args)
        return
    with slow_link.hosts(args.nodes):
        command = [sys.executable, __file__, f"--nodes={args.nodes}"]
        running = [slow_link.start(i, i % 2, [*command, f"--host={i}"]) for i in range(args.nodes)]
        for rate in args.rates:
            slow_link.limit(args.nodes, rate)
            for each in running:
                each.stdin.write("go\n")
                each.stdin.flush()
            answers = [next(x for x in r.stdout if x.startswith("answer ")) for r in running]
            found = json.loads(answers[0].removeprefix("answer "))
            row = {"nodes": args.nodes, "mbit": rate, "ms": found}
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        for each in running:
            each.stdin.close()
        for each in running:
            each.wait(60)


if __name__ == "__main__":
    main()
