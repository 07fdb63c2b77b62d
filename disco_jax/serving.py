"""What the command line does with a packed model: serve images, measure links, start again.

Needs the packed model and the config's evaluation transforms; no training code and no data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from ml_collections import ConfigDict

from disco_jax import plan, runtime, tasks
from disco_jax.data.images import image_files
from disco_jax.data.preprocess import evaluation
from disco_jax.errors import DiscoError, require
from disco_jax.plan import artifact
from disco_jax.runtime import launch
from disco_jax.runtime.peers import Facts, Peers
from disco_jax.runtime.supervise import Supervisor

Hosts = dict[str, Any]  # the arguments of ``runtime.connect``


def serve(
    config: ConfigDict,
    workdir: Path,
    hosts: Hosts,
    batch: int,
    images: str | None,
    output: str | None = None,
    overwrite: bool = True,
) -> int:
    """Says what is in every image: a line of JSON for each on stdout of node 0.

    Pictures, masks or enlarged images, go to the folder ``output``; with ``overwrite`` they replace
    those of an earlier run.
    """
    preprocess, folder = evaluation(config), None if output is None else Path(output)
    if folder is not None:
        require(
            images in (None, "-") or folder.resolve() != Path(str(images)).resolve(),
            f"`output` (={output}) is the folder of the images, which would be overwritten; name "
            "another",
        )
        folder.mkdir(parents=True, exist_ok=True)
    facts = {"preprocess": repr(preprocess), "batch_size": batch, "pillow": PIL.__version__}
    paths, say = _paths(images, hosts), _stdout()
    with _loaded(workdir, hosts, facts) as (frozen, peers):
        classes = json.loads(getattr(frozen.model, "config", "{}")).get("num_classes", 0)
        task = tasks.of(config, classes)
        session = runtime.Session(frozen, preprocess, peers, batch, task, folder, overwrite)
        if peers.node == 0:
            for answer in session.answers(paths):
                say(json.dumps(answer))
            print(session.summary(), file=sys.stderr)
        else:
            session.follow()
    return 0


def profile(config: ConfigDict, workdir: Path, hosts: Hosts) -> int:
    """Prints what one image takes, link by link and exchange by exchange."""
    size, say = config.data.size, _stdout()
    image = np.random.default_rng(0).normal(size=(1, size, size, len(config.data.mean)))
    with _loaded(workdir, hosts, {"size": str(image.shape[1:])}) as (frozen, peers):
        found = runtime.profile(frozen, image.astype(np.float32))  # type: ignore[arg-type]
        if peers.node == 0:
            say(str(found))
    return 0


def supervise(argv: list[str], images: str | None, hosts: Hosts, restarts: int, batch: int) -> int:
    """Runs the same command without ``--supervise``, again and again while nodes get lost."""
    command = [sys.executable, "-m", "disco_jax.main", *argv[1:]]
    command += ["--nosupervise", "--restarts=0", "--images=-"]
    paths = _paths(images, hosts)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # not without the child
    limits = {"restarts": restarts, "ahead": 2 * batch + 16}
    return Supervisor(command, paths, _stdout(), **limits, again=["--nooverwrite"]).run()


@contextlib.contextmanager
def _loaded(workdir: Path, hosts: Hosts, facts: Facts) -> Iterator[tuple[plan.Frozen, Peers]]:
    """The packed model of a workdir, on hosts that agree on which it is and what they will do."""
    directory = workdir / artifact.PACKED
    require(
        (directory / artifact.MANIFEST).is_file(),
        f"`workdir` (={workdir}) has no packed model; run --mode=freeze there first",
    )
    manifest = artifact.read_manifest(directory)
    nodes, sums = manifest["nodes"], manifest["sha256"]
    place = launch.find(**hosts)
    require(
        place is None or place[1] == nodes,
        f"`num_nodes` (={place and place[1]}) must be that of the plan in {directory} (={nodes}); "
        f"start {nodes} processes, or freeze with --config.nodes={place and place[1]}",
    )
    weights = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    facts = {"plan": sums[artifact.PLAN][:16], "weights": weights[:16], **facts}
    with runtime.connect(**hosts, facts=facts) as peers:
        yield plan.load(directory, runtime.mesh_of_hosts(nodes)), peers


def _paths(images: str | None, hosts: Hosts) -> Iterator[str]:
    """The images that node 0 is to serve; none on any other."""
    require(
        images is not None,
        "`--images` is missing; pass a folder, or - to read a path from each line of stdin",
    )
    place = launch.find(**hosts)
    if place is not None and place[2] > 0:
        return iter(())
    if images == "-":
        lines = (os.fsdecode(line).rstrip("\r\n") for line in sys.stdin.buffer)
        return (line for line in lines if line)
    folder = Path(str(images))
    require(
        folder.is_dir(),
        f"`images` (={images}) is not a folder; name one, or - to read paths from stdin",
    )
    found = [str(path) for path in image_files(folder.iterdir())]
    require(bool(found), f"`images` (={images}) holds no images; name another folder")
    broken = [path for path in found if "\n" in path]
    require(not broken, f"`images` has the file {broken[:1]} with a line break; rename it")
    return iter(found)


def _stdout() -> Callable[[str], None]:
    """Writes lines to stdout; what libraries print there, as gloo does, goes to stderr from now."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def say(line: str) -> None:
        try:
            out.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise DiscoError("`stdout` was closed by whoever reads it; keep it open") from None

    return say
