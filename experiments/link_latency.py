"""Latency of one image over a slow link: networks on two hosts of one core each.

    pip install -e . onnx onnxruntime
    sudo python experiments/link_latency.py             # every rate, then memory and streams
    sudo python experiments/link_latency.py --nodes=4 --rates 100
    sudo python experiments/link_latency.py --cpu=0.4 --rates 100 --what latency
    sudo python experiments/link_latency.py --model=deit_s --rates 300 100 30 --what latency
    sudo python experiments/link_latency.py --model=ssd300 --rates 100 --what latency
    sudo python experiments/link_latency.py --what front    # rows, channels, and plans of both
    sudo python experiments/link_latency.py --what front --burst=2 --rates 100    # a wire
    python experiments/link_figure.py                   # table and figure of what is there

Linux and root: the hosts are network namespaces, see ``slow_link.py``. Every program is loaded from
its saved plan in a process of its own on each host, and they take turns, so that ratios within one
line are ratios within one run. One JSON line per rate is appended to
``results/link_latency.jsonl``. With ``--cpu`` the hosts have a share of a core each (control
groups of version 1), as smaller devices would. Accuracy plays no part: the weights are random, and
what a mask costs depends on its size alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import slow_link
from link_host import ANSWER, BEST, NOTHING, ONNX, RIVALS, ROWS, WAYS, front, host, prepare

Rows = dict[str, dict[str, Any]]
RESULTS = Path(__file__).parent / "results" / "link_latency.jsonl"


class Hosts:
    """The processes of one program, a host each, which all do the same."""

    ports = itertools.count(9876)

    def __init__(self, args: argparse.Namespace, way: str):
        self.way, self.ours, nodes = way, way not in (NOTHING, *RIVALS[args.model]), args.nodes
        command = [sys.executable, __file__, f"--nodes={nodes}", f"--plans={args.plans}"]
        command += [f"--model={args.model}", f"--port={next(self.ports)}", f"--way={way}"]
        self.running = [slow_link.start(i, i % 2, [*command, f"--host={i}"]) for i in range(nodes)]
        self.bytes = self.answers()[0]

    def answers(self) -> list[Any]:
        # gloo prints to stdout as well
        found = [next((x for x in r.stdout if x.startswith(ANSWER)), "") for r in self.running]
        if not all(found):
            raise SystemExit("a host ended; see its message above")
        return [json.loads(answer.removeprefix(ANSWER)) for answer in found]

    def tell(self, ask: str, **what: Any) -> None:
        for running in self.running:
            running.stdin.write(json.dumps({"ask": ask, **what}) + "\n")
            running.stdin.flush()

    def ask(self, ask: str, **what: Any) -> list[Any]:
        """What each host answers."""
        self.tell(ask, **what)
        return self.answers()

    def seconds(self, iterations: int) -> list[float]:
        """Of each run, at host 0, where the result is."""
        return self.ask("seconds", iterations=iterations)[0]

    def close(self) -> None:
        for running in self.running:
            running.stdin.close()
        for running in self.running:
            running.wait(60)


def sent(nodes: int) -> int:
    return sum(slow_link.bytes_sent(i) for i in range(nodes))


def measure(every: dict[str, Hosts], rounds: int, each: int) -> tuple[Rows, dict[str, float]]:
    """A row for every program, and the link; all take turns, for machines change their speed."""
    seconds: dict[str, list[float]] = {way: [] for way in every}
    ours = [way for way, hosts in every.items() if hosts.ours]
    computing: dict[str, list[list[float]]] = {way: [] for way in ours}
    wire: dict[str, int] = dict.fromkeys(every, 0)
    links = []
    for turn in range(rounds):
        for way, hosts in every.items():
            hosts.seconds(1)  # what the one before left behind
            before = sent(len(hosts.running))
            seconds[way] += hosts.seconds(each)
            wire[way] += sent(len(hosts.running)) - before
            if hosts.ours:
                computing[way].append(hosts.ask("compute", iterations=each))
        if turn % max(1, rounds // 4) == 0:
            links.append(every[ours[-1]].ask("link")[0])
    rows: Rows = {
        way: {
            "ms": round(1e3 * statistics.median(times), 2),
            "plan_bytes": every[way].bytes,
            "wire_bytes": round(wire[way] / len(times)),
        }
        for way, times in seconds.items()
    }
    for way, found in computing.items():
        rows[way]["compute_ms"] = slowest(found)
    return rows, {name: statistics.median(link[name] for link in links) for name in links[0]}


def slowest(found: list[list[list[float]]]) -> float:
    """Median ms of the slowest host; given are seconds by round, host and iteration."""
    hosts = (itertools.chain.from_iterable(rounds) for rounds in zip(*found, strict=True))
    return round(1e3 * max(map(statistics.median, hosts)), 2)


def predict(found: Rows, ours: list[str], plans: Path, link: dict[str, float], mbit: float) -> None:
    """Adds to every way of ours the predicted latency, and the limit without overlap.

    The limit is bytes over the rate that was set, α for each message, and the computation. Beside
    them the share of a single host's weights that each has.
    """
    from disco_jax.cost import Link
    from disco_jax.cost import predict as predicted
    from disco_jax.plan import CommunicationPlan

    measured = Link(**link)
    for name in ours:
        plan = CommunicationPlan.from_json((plans / name / "plan.json").read_text())
        row = found[name]
        row["predicted_ms"] = round(predicted(plan, measured, compute_ms=row["compute_ms"]).ms, 2)
        bytes_ms = plan.traffic_bytes / plan.nodes / mbit / 125
        row["memory"] = round(plan.weight_bytes_per_node / plan.single_node_weight_bytes, 3)
        row["limit_ms"] = round(bytes_ms + plan.collectives * measured.ms + row["compute_ms"], 2)


def fronts(args: argparse.Namespace) -> None:
    """One line for each rate, of plans made for it."""
    for rate in args.rates:
        plans = args.plans / f"front-{rate:g}-{speed(args):g}-{args.burst}"  # what they depend on
        make(args, plans, rate)
        at_rate = argparse.Namespace(**{**vars(args), "plans": plans, "rates": [rate]})
        planned = list(front(args.model, rate, speed(args), args.burst))
        same = {way: os.readlink(plans / way) for way in planned if (plans / way).is_symlink()}
        rivals = [way for way in RIVALS[args.model] if way != ROWS]
        ways = [way for way in (*planned, *rivals) if way not in same]
        latencies(at_rate, ways, what="front", same=same)


def speed(args: argparse.Namespace) -> float:
    """Multiplications of a host in 10⁹ a second; hosts may have to share cores."""
    return args.gmacs * min(args.cpu, os.cpu_count() / args.nodes)


def make(args: argparse.Namespace, plans: Path, rate: float | None = None) -> None:
    """Plans that are not there yet, in a process of its own; those of a front have a rate."""
    ways = WAYS[args.model]
    if rate is not None:
        ways = front(args.model, rate, speed(args), args.burst)
    if (plans / list(ways)[-1]).exists():
        return
    command = [sys.executable, __file__, "--prepare", f"--nodes={args.nodes}"]
    command += [f"--model={args.model}", f"--plans={plans}"]
    command += [f"--gmacs={args.gmacs}", f"--cpu={args.cpu}", f"--burst={args.burst}", "--rates"]
    subprocess.run([*command, *([] if rate is None else [str(rate)])], check=True)


def latencies(
    args: argparse.Namespace,
    ways: list[str],
    what: str = "latency",
    same: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """One line for each rate; ways that are the same as others are not measured again."""
    every = {way: Hosts(args, way) for way in ways}
    ours = [way for way, hosts in every.items() if hosts.ours]
    differences = {way: max(every[way].ask("difference")) for way in ours}
    print("relative to one process that plays all nodes:", differences, flush=True)
    for rate in args.rates:
        slow_link.limit(args.nodes, rate, args.burst)
        each = max(1, args.iterations // 10)
        found, link = measure(every, args.iterations // each, each)
        for way in ours:
            found[way]["difference"] = differences[way]
        predict(found, ours, args.plans, link, rate)
        found |= {way: {**found[other], "same_as": other} for way, other in same.items()}
        hosts = {"gmacs": args.gmacs} if what == "front" else {}
        write(args, {"what": what, "mbit": rate, **hosts, "link": link, "ways": found})
    for hosts in every.values():
        hosts.close()


def memories(args: argparse.Namespace, ways: list[str]) -> None:
    """Peak resident memory of each program's process, above one that computes ``x + 1``."""
    peaks = {}
    for way in (NOTHING, *ways):
        hosts = Hosts(args, way)
        hosts.seconds(3)
        peaks[way] = hosts.ask("memory")[0]
        hosts.close()
    above = {way: round(peak - peaks[NOTHING], 1) for way, peak in peaks.items()}
    write(
        args, {"what": "memory", "mib": {w: round(p, 1) for w, p in peaks.items()}, "above": above}
    )


def streams(args: argparse.Namespace, rate: float) -> None:
    """Images a second with several in flight: programs that take turns, and images in a batch.

    ``limit`` is what the busier of the two would allow alone: a node's link, or its core.
    """
    slow_link.limit(args.nodes, rate, args.burst)
    every = [Hosts(args, BEST) for _ in range(2)]
    ways = list(itertools.product((1, 2), (1, 2, 4, 8)))
    batches = {images: max(1, args.iterations // images) for _, images in ways}
    computing, seconds = [], dict.fromkeys(ways, 0.0)
    for hosts, images in itertools.product(every, (1, 2, 4, 8)):
        hosts.ask("seconds", iterations=2, images=images)
    for _ in range(4):
        computing.append(every[0].ask("compute", iterations=args.iterations))
        for programs, images in ways:
            seconds[programs, images] += stream(every[:programs], batches[images], images)
    for hosts in every:
        hosts.close()
    sending = every[0].bytes / args.nodes / rate / 125_000
    busy = max(sending, slowest(computing) / 1e3)
    found = {
        f"{programs} x {images}": round(
            4 * programs * batches[images] * images / seconds[programs, images], 3
        )
        for programs, images in ways
    }
    row = {"what": "streams", "mbit": rate, "images_per_second": found, "limit": round(1 / busy, 3)}
    write(args, row)


def stream(running: list[Hosts], batches: int, images: int) -> float:
    """Seconds in which each program does so many batches of so many images."""
    start = time.perf_counter()
    for hosts in running:
        hosts.tell("seconds", iterations=batches, images=images)
    for hosts in running:
        hosts.answers()
    return time.perf_counter() - start


def write(args: argparse.Namespace, row: dict[str, Any]) -> None:
    network = {} if args.model == "resnet50" else {"model": args.model}
    hosts = {"cpu": args.cpu} if args.cpu < 1 else {}
    link = {"burst": args.burst} if args.burst != 64 else {}
    row = {"nodes": args.nodes, **network, **hosts, **link, **row}
    with args.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="*", default=[1000, 300, 100, 30, 10])
    parser.add_argument("--model", choices=WAYS, default="resnet50")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpu", type=float, default=1.0, help="share of a core that a host has")
    parser.add_argument("--burst", type=int, default=64, help="kB that pass at once after a rest")
    parser.add_argument(
        "--gmacs", type=float, default=41, help="of a core, 10⁹ a second: for a front's plans"
    )
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--what", nargs="+", default=["latency", "memory", "streams"])
    parser.add_argument("--plans", type=Path, help="where to keep the plans; in runs/")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--port", type=int, default=9876, help=argparse.SUPPRESS)
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    network = "" if args.model == "resnet50" else f"{args.model}-"
    args.plans = (args.plans or Path("runs") / f"link-{network}{args.nodes}").absolute()
    if args.host is not None:
        host(args.plans, args.model, args.nodes, args.host, args.port, args.way)
    elif args.prepare:
        ways = WAYS[args.model]
        if args.rates:
            ways = front(args.model, *args.rates, speed(args), args.burst)
        prepare(args.plans, args.model, args.nodes, ways)
    else:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.plans / "compiled"))
        if args.what != ["front"]:
            make(args, args.plans)
        with slow_link.hosts(args.nodes):
            slow_link.limit(args.nodes, 1000)
            if args.cpu < 1:
                slow_link.slow_down(args.nodes, args.cpu)
            ways = [*WAYS[args.model], *RIVALS[args.model]]
            ways = [way for way in ways if way != ROWS or args.nodes == 2]
            if "latency" in args.what:
                latencies(args, ways)
            if "front" in args.what:
                fronts(args)
            if "memory" in args.what:
                memories(args, [way for way in ways if way != ONNX])
            if "streams" in args.what and BEST in ways:
                streams(args, 100)


if __name__ == "__main__":
    main()
