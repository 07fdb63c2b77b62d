"""What each host of ``link_latency.py`` loads and runs: one program a process."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import slow_link

SIZES = {"ssd300": (300, 300), "deeplabv3_resnet50": (513, 513), "edsr": (360, 640)}
SIZE = (224, 224)  # of all others
ANSWER = "answer "
# What the planner is told: milliseconds for an image on this link and these cores.
MILLISECONDS = {"resnet50": 38, "ssd300": 330, "deeplabv3_resnet50": 1200, "edsr": 2800}
LINK, GMACS = {"mbit": 100, "ms": 0.2}, 72
INTEGERS = ("int4", "int8")
DENSE: dict[str, dict[str, Any]] = {
    "dense float32": {"density": 1.0},
    "0.2 float32": {"density": 0.2},
    "0.2 int8": {"density": 0.2, "wire_dtype": "int8"},
}
BEST = "planned"
RESULT = {"result_dtype": "float16"}
# How results travel in a best way.
OPTIONS: dict[str, dict[str, Any]] = {
    "resnet50": {},
    "ssd300": RESULT,
    "deeplabv3_resnet50": RESULT,
    "edsr": {**RESULT, "parts": True},
}
# What is measured of each network: our ways first.
WAYS = {
    network: {
        **DENSE,
        BEST: {
            "plan": {"minimise": "loss", "ms": ms, "rows": False},
            "options": OPTIONS[network],
        },
    }
    for network, ms in MILLISECONDS.items()
}
WAYS["deit_s"] = DENSE
# Split by rows, the first layers or all.
STAGES = ("^conv$", r"^blocks\.[0-6]\.")
HALF: dict[str, Any] = {"row_dtype": "float16", "options": RESULT}
WAYS["resnet50"] |= {
    "rows early, 0.2 int8": {
        "rows": STAGES,
        "row_dtype": "float16",
        "density": 0.2,
        "wire_dtype": "int8",
    },
}
WAYS["edsr"] |= {"all rows": {"rows": ("",), **HALF}}
WAYS["deeplabv3_resnet50"] |= {"all rows": {"rows": ("",), **HALF}}
ALONE, ROWS, ONNX, MEGATRON = "one host", "rows", "one host, ONNX Runtime", "Megatron"
RIVALS = dict.fromkeys(MILLISECONDS, (ALONE,))
RIVALS |= {"resnet50": (ROWS, ALONE, ONNX), "deit_s": (MEGATRON, ALONE)}
NOTHING = "nothing"
MEMORIES = (0.36, 0.55, 1.0)  # shares of the weights that a front has plans for


def front(network: str, mbit: float, gmacs: float, burst: int) -> dict[str, dict[str, Any]]:
    """The ways that are fastest on a link, of as much energy as density 0.2 keeps, and rivals."""
    # As `measure_links` finds it behind the buckets of `slow_link.py`: without a burst two nodes
    # that send 100 kB take turns.
    link = {"mbit": 0.945 * mbit, "burst": 42_000, "peak_mbit": 80_000}
    if burst < 64:
        link = {"mbit": 0.52 * mbit, "burst": 20_000, "peak_mbit": 0.9 * mbit}
    link |= {"ms": 0.05, "jitter": 0.2}
    wanted = {"link": link, "gmacs": gmacs, "density": 0.2}
    options = {"options": OPTIONS[network] | RESULT if network != "resnet50" else {}}
    ways: dict[str, dict[str, Any]] = {
        "rows only": {"rows": ("",), "row_dtype": "float16"},
        "0.2 int8": DENSE["0.2 int8"],
        "channels only": {"plan": {**wanted, "rows": False}},
        **{f"planned, {share}": {"plan": {**wanted, "memory": share}} for share in MEMORIES},
    }
    return {name: way | options for name, way in ways.items()}


def image(network: str) -> Any:
    shape = (1, *SIZES.get(network, SIZE), 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def prepare(directory: Path, network: str, nodes: int, ways: dict[str, dict[str, Any]]) -> None:
    """Freezes a network in every way, and saves what each host will load."""
    import jax
    from flax import nnx

    import disco_jax as dj

    def create(nodes: int, **options: Any) -> nnx.Module:
        mesh = dj.NodeMesh(nodes, emulate=True)
        return dj.models.create(network, mesh=mesh, rngs=nnx.Rngs(0), **options)

    x = image(network)
    dj.freeze(create(1), x).save(directory / ALONE)
    made: dict[Any, str] = {}
    for name, way in ways.items():
        model = create(nodes, **way.get("options", {}))
        wires = way.get("wire_dtype", "float32")
        rows, row_dtype = way.get("rows", ()), way.get("row_dtype")
        if "plan" in way:
            wanted = {"link": LINK, "gmacs": GMACS, "wire_dtypes": INTEGERS, **way["plan"]}
            link = dj.cost.Link(**wanted.pop("link"))
            planned = dj.cost.plan_splits(model, x, link, **wanted)
            print(f"{name}:\n{planned}", flush=True)
            rows, row_dtype, wires = planned.rows, planned.row_dtype, planned.wire_rules
            same = made.setdefault(repr((rows, planned.rules, wires)), name)
            if same != name:
                (directory / name).symlink_to(same)
                continue
        dj.split(model, x, rows, wire_dtype=row_dtype)
        if "plan" in way and planned.rules:
            dj.sparsify.prune(model, 0.0, rules=planned.rules)
        if "density" in way:
            dj.sparsify.prune(model, way["density"], "random")
        frozen = dj.freeze(model, x, wire_dtype=wires, message_bytes=100_000)
        frozen.save(directory / name)
        np.savez(directory / f"{name}.npz", *jax.tree.leaves(frozen(x)))  # what hosts must find
        print(f"{name}: {frozen.plan.traffic_bytes:,} bytes", flush=True)


def alone(directory: Path) -> Any:
    import jax

    import disco_jax as dj

    return dj.load(directory / ALONE, dj.NodeMesh(1, devices=jax.local_devices()))


def weights(directory: Path) -> dict[str, tuple[Any, Any]]:
    """Kernels and biases of the same network, for the rivals."""
    from disco_jax.trace import modules

    found = {path: m for path, m in modules(alone(directory).model) if hasattr(m, "kernel")}
    kernels = {path: np.asarray(m.kernel[...]) for path, m in found.items()}
    return {
        path: (kernel[0] if len(kernel) == 1 else kernel, np.asarray(found[path].bias[...]))
        for path, kernel in kernels.items()
    }


def variables(directory: Path) -> dict[str, Any]:
    """All weights of the same network by path."""
    from flax import nnx

    state = nnx.to_flat_state(nnx.state(alone(directory).model, nnx.Param))
    found = {".".join(map(str, path)): np.asarray(v[...]) for path, v in state}
    packed = {path for path in found if path.endswith("kernel") and not path.startswith("patches")}
    return {path: value[0] if path in packed else value for path, value in found.items()}


def nothing(x: Any) -> Any:
    """What a host does while the other works alone."""
    import jax

    return jax.jit(lambda x: x + 1)(x)


class Host:
    """One host with one program: runs what it is told on stdin, and answers."""

    def __init__(self, directory: Path, network: str, nodes: int, way: str):
        import jax
        import megatron
        import onnx_resnet
        import row_split

        import disco_jax as dj

        self.image, self.frozen, self.bytes = image(network), None, 0
        program: Callable = nothing
        if way != ALONE and (directory / way / "plan.json").exists():
            program = self.frozen = dj.load(directory / way, dj.NodeMesh(nodes))
            self.bytes = self.frozen.plan.traffic_bytes
        elif way == ROWS:
            program, self.bytes = row_split.program(weights(directory), dj.NodeMesh(nodes).jax_mesh)
        elif way == MEGATRON:
            mesh = dj.NodeMesh(nodes).jax_mesh
            program, self.bytes = megatron.program(variables(directory), 64, mesh)
        elif way == ALONE and jax.process_index() == 0:
            program = alone(directory)
        elif way == ONNX and jax.process_index() == 0:
            program = onnx_resnet.program(weights(directory), SIZE[0])
        self.expected = directory / f"{way}.npz"
        self.program = program
        jax.block_until_ready(program(self.image))

    def answer(self, question: dict[str, Any]) -> Any:
        """Seconds of runs, or what was measured of links, computation or memory."""
        import dataclasses

        import jax

        from disco_jax import runtime

        match question["ask"]:
            case "seconds":
                batch = self.image.repeat(question.get("images", 1), 0)
                return seconds_of(self.program, batch, question["iterations"])
            case "link":
                return dataclasses.asdict(runtime.measure_links(self.frozen.mesh).default)
            case "compute":
                return seconds_of(self.share, self.image, question["iterations"])
            case "difference":
                mine = jax.tree.leaves(self.program(self.image))
                return max(map(difference, mine, np.load(self.expected).values()))
            case "memory":
                status = Path("/proc/self/status").read_text()
                return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    @functools.cached_property
    def share(self) -> Callable:
        """What this host computes of the program, without any link."""
        import jax

        from disco_jax.plan import share

        program = share(self.frozen, jax.process_index())
        jax.block_until_ready(program(self.image))
        return program


def difference(mine: Any, expected: np.ndarray) -> float:
    """How far what this host has of a result is from what was expected, relative to the largest."""
    furthest = max(np.abs(s.data - expected[s.index]).max() for s in mine.addressable_shards)
    return float(furthest / np.abs(expected).max())


def seconds_of(program: Callable, images: Any, iterations: int) -> list[float]:
    import jax

    seconds = []
    for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(program(images))
        seconds.append(time.perf_counter() - start)
    return seconds


def host(directory: Path, network: str, nodes: int, node: int, port: int, way: str) -> None:
    """Answers what it is asked on stdin until that ends."""
    from disco_jax import runtime

    with runtime.connect(f"{slow_link.address(0)}:{port}", nodes, node):
        runs = Host(directory, network, nodes, way)
        print(ANSWER + json.dumps(runs.bytes), flush=True)
        for line in sys.stdin:
            print(ANSWER + json.dumps(runs.answer(json.loads(line))), flush=True)
