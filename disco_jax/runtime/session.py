"""A packed model at work: images come in at node 0, and the answers come out there, in order."""

from __future__ import annotations

import io
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image

from disco_jax.data.images import decode
from disco_jax.data.preprocess import Preprocess
from disco_jax.errors import DiscoError, require
from disco_jax.gather import everywhere
from disco_jax.heap import give_back_memory
from disco_jax.mesh import NodeMesh
from disco_jax.plan import Frozen, Program
from disco_jax.runtime.launch import connected
from disco_jax.runtime.peers import Peers
from disco_jax.tasks import Classification, Task

Answer = dict[str, Any]
Found = dict[str, np.ndarray]  # the arrays of one image
Example = dict[str, Any]  # one image as the model takes it, and what is known of it
REMEMBERED = 10_000  # batches whose times make up the percentiles


class Answers(nnx.Module):
    """A model, and what its task says of each image, known to every node.

    A classifier's logits stay split over the nodes where they divide by them; they are collected
    here. This one gather of ``4 * classes * (nodes - 1)`` bytes per image comes on top of the plan.
    """

    def __init__(self, model: nnx.Module, mesh: NodeMesh, task: Task):
        self.model, self.mesh, self.task = model, mesh, task

    def __call__(self, images: Float[Array, "b ..."]) -> dict[str, Array]:
        outputs: Any = self.model(images)  # type: ignore[operator]
        split = isinstance(self.task, Classification) and not outputs.shape[-1] % self.mesh.nodes
        return self.task.answer(everywhere(outputs, self.mesh) if split else outputs)


class Session:
    """A loaded model, compiled and warm, on this host or as one of several.

    Node 0 calls :meth:`answers`, all others :meth:`follow`. Every node prepares the images itself,
    from the bytes of the files that node 0 has read.

    Args:
      frozen: the packed model, on one device per process where there are several.
      preprocess: from pixels to the model's input; for images of 1 (grey) or 3 channels. If it
        leaves images of any size as they are, there is a compilation for every new size.
      peers: the other nodes.
      batch_size: images at a time; the last batch is filled up.
      task: what is said of an image, its class by default.
      output: where pictures go (masks, enlarged images), as PNG files of the images' names,
        numbered from the second of a name on.
      overwrite: whether files that were there before this session may be replaced.

    Raises:
      DiscoError: if there are other than 1 or 3 channels, or batches of images of any size.
    """

    def __init__(
        self,
        frozen: Frozen,
        preprocess: Preprocess,
        peers: Peers,
        batch_size: int = 1,
        task: Task | None = None,
        output: Path | None = None,
        overwrite: bool = True,
    ):
        channels, size = len(preprocess.mean), preprocess.size
        require(
            channels in (1, 3),
            f"`data.mean` (={preprocess.mean}) must have 1 (grey) or 3 entries, as image files do",
        )
        require(
            size > 0 or batch_size == 1,
            f"`batch_size` (={batch_size}) must be 1 for images of any size; leave it out",
        )
        self._preprocess, self._peers = preprocess, peers
        self._task, self._output = task or Classification(), output
        self._written: set[Path] = set()
        self._overwrite = overwrite
        answers = Answers(frozen.model, frozen.mesh, self._task)
        self._program = Program(answers, frozen.plan.message_bytes)
        self._shape = (batch_size, size, size, channels)
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._served = self._unreadable = 0
        if size > 0:
            self._run([])
        give_back_memory()

    def answers(self, paths: Iterable[str]) -> Iterator[Answer]:
        """Node 0: for each path ``{"image"}`` and what the task says, or ``{"image", "error"}``.

        Of a classifier ``"class"`` and ``"score"``; ``"written"`` is the path of a picture.
        """
        paths = iter(paths)
        while some := list(itertools.islice(paths, self._shape[0])):
            yield from self._answer(some)
        self._peers.give([])

    def follow(self) -> None:
        """Every other node: computes its share until node 0 has no more images."""
        while files := self._peers.take():
            self._run([self._prepare(file, "from node 0") for file in files])

    def summary(self) -> str:
        """How many images were served, and how fast: times from reading a batch to its answers."""
        said = f"{self._served} images served, {self._unreadable} unreadable"
        if not self._seconds:
            return said
        p50, p90, p99 = 1e3 * np.percentile(self._seconds, (50, 90, 99))
        rate = self._shape[0] / np.mean(self._seconds)
        return (
            f"{said}; a batch of {self._shape[0]} in p50 {p50:.1f} ms, p90 {p90:.1f} ms, "
            f"p99 {p99:.1f} ms; {rate:.1f} images/s"
        )

    def _answer(self, paths: Sequence[str]) -> list[Answer]:
        start = time.perf_counter()
        read, errors = [], {}
        for i, path in enumerate(paths):
            try:
                read.append(self._read(Path(path)))
            except DiscoError as error:
                errors[i] = str(error)
        self._unreadable += len(errors)
        found: Iterator[Answer] = iter(())
        if read:
            files, examples = zip(*read, strict=True)
            self._peers.give(files)
            found = iter(self._run(examples))
            self._served += len(read)
            self._seconds.append(time.perf_counter() - start)
        return [
            {"image": path, **({"error": errors[i]} if i in errors else self._said(path, found))}
            for i, path in enumerate(paths)
        ]

    def _said(self, path: str, found: Iterator[Found]) -> Answer:
        said = self._task.said(next(found))
        picture = said.pop("picture", None)
        if picture is not None and self._output is not None:
            file = self._new(self._output, Path(path).stem)
            Image.fromarray(picture.squeeze()).save(file)
            said["written"] = str(file)
        return said

    def _new(self, folder: Path, stem: str) -> Path:
        """A file that this session has not written: images of several folders may share a name."""
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        files = (folder / f"{name}.png" for name in names)
        taken = self._written.__contains__ if self._overwrite else Path.exists
        file = next(itertools.filterfalse(taken, files))
        self._written.add(file)
        return file

    def _read(self, path: Path) -> tuple[bytes, Example]:
        require(path.is_file(), f"`image` {path} is not a file; name one that exists")
        try:
            file = path.read_bytes()
        except OSError as error:
            raise DiscoError(
                f"`image` {path} cannot be read ({error.strerror}); replace or remove the file"
            ) from None
        return file, self._prepare(file, str(path))

    def _prepare(self, file: bytes, name: str) -> Example:
        image = decode(io.BytesIO(file), name, self._shape[-1])
        return self._preprocess({"image": image}, np.random.default_rng(0))

    def _run(self, examples: Sequence[Example]) -> list[Found]:
        """What there is to say of each image."""
        shape = self._shape if self._preprocess.size else (1, *examples[0]["image"].shape)
        batch = np.zeros(shape, np.float32)
        for place, example in zip(batch, examples, strict=False):
            place[:] = example["image"]
        found = jax.device_get(self._program(batch))  # type: ignore[arg-type]
        return [
            {**example, **{k: v[i] for k, v in found.items()}} for i, example in enumerate(examples)
        ]


def mesh_of_hosts(nodes: int) -> NodeMesh:
    """A node for each process; in a process that is alone all nodes."""
    if not connected():
        return NodeMesh(nodes)
    first = {device.process_index: device for device in reversed(jax.devices())}
    return NodeMesh(nodes, devices=[first[i] for i in range(nodes)])
