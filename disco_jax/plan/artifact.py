"""A packed model as a directory, of which every node needs the plan and its own weights alone.

plan.json            what crosses the links
manifest.json        format, model configuration, shapes, checksums
node-0.safetensors   the weights of node 0, and so on
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Shaped
from safetensors import safe_open
from safetensors.numpy import save_file

from disco_jax.errors import DiscoError, require
from disco_jax.mesh import NODE, NodeMesh
from disco_jax.plan.fold import folded
from disco_jax.plan.spec import CommunicationPlan
from disco_jax.version import __version__

FORMAT = 2
PLAN, MANIFEST = "plan.json", "manifest.json"
PACKED = "packed"  # where in a workdir the command line saves it


def write(
    model: nnx.Module, plan: CommunicationPlan, directory: Path | str, *, replace: bool = False
) -> None:
    """Writes a packed model; the directory appears when all of it is there.

    Raises:
      DiscoError: if the directory exists and is not empty (with ``replace``: and is no packed
        model) or cannot be written, or this process has not all of the model.
    """
    nodes, variables = plan.nodes, whole(model)
    with new_directory(directory, replace) as begun:
        (begun / PLAN).write_text(plan.to_json())
        for node in range(nodes):
            save_file(node_share(variables, node, nodes), str(begun / weights_file(node)))
        manifest = {
            "format": FORMAT,
            "disco_jax": __version__,
            "nodes": nodes,
            "model": getattr(model, "config", None),
            "split_by_rows": getattr(model, "split_by_rows", None),
            "folded": folded(model),
            "axes": {name: _node_axis(v[...]) for name, v in variables.items()},
            "sha256": checksums(begun, (PLAN, *map(weights_file, range(nodes)))),
        }
        (begun / MANIFEST).write_text(json.dumps(manifest, indent=1))


@contextlib.contextmanager
def new_directory(directory: Path | str, replace: bool = False) -> Iterator[Path]:
    """Where to write what is to be ``directory`` when all of it is there.

    Raises:
      DiscoError: if the directory exists and is not empty (with ``replace``: and is no packed
        model), or cannot be written.
    """
    directory = Path(directory)
    require(
        not directory.exists()
        or (replace and (directory / MANIFEST).is_file())
        or (directory.is_dir() and not any(directory.iterdir())),
        f"`directory` (={directory}) exists and is not empty; remove it, or choose another",
    )
    begun, old = (directory.with_name(directory.name + end) for end in (".partial", ".old"))
    try:
        for left in (begun, old):  # by a process that was interrupted
            shutil.rmtree(left, ignore_errors=True)
        begun.mkdir(parents=True)
        yield begun
        if replace and directory.exists():
            directory.replace(old)
        begun.replace(directory)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DiscoError(
            f"`directory` (={directory}) cannot be written ({error.strerror}); choose another"
        ) from None


def whole(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of a packed model by name.

    Raises:
      DiscoError: if this process has not all of them.
    """
    variables = _variables(model)
    require(
        all(v[...].is_fully_addressable for v in variables.values()),
        f"`model` (={type(model).__name__}) is spread over several hosts; freeze and write it in "
        "one process that has all of it",
    )
    return variables


def node_share(
    variables: Mapping[str, nnx.Variable], node: int, nodes: int
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """What one node computes with."""
    return {n: _share(v[...], _node_axis(v[...]), node, nodes) for n, v in variables.items()}


def checksums(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files by their names."""
    return {name: _checksum(directory / name) for name in names}


def weights_file(node: int) -> str:
    """The name of the file that holds what node ``node`` computes with."""
    return f"node-{node}.safetensors"


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return {".".join(map(str, path)): variable for path, variable in state}


def _node_axis(value: jax.Array) -> int | None:
    """The axis that is shared by the nodes; None where all of them hold everything."""
    spec = tuple(getattr(value.sharding, "spec", ()))
    return spec.index(NODE) if NODE in spec else None


def _share(value: jax.Array, axis: int | None, node: int, nodes: int) -> Shaped[np.ndarray, "..."]:
    whole = np.asarray(value)
    part = whole if axis is None else np.split(whole, nodes, axis)[node]
    return np.ascontiguousarray(part)


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DiscoError(
            f"`{path}` cannot be read ({error.strerror}); pass a directory that frozen.save wrote"
        ) from None


def read_manifest(directory: Path) -> dict[str, Any]:
    """What a directory says of itself; a DiscoError if it is none that was saved, or another's."""
    _checksum(directory / MANIFEST)  # says it if there is none
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DiscoError(
            f"`{directory / MANIFEST}` is damaged ({error!r}); copy it again"
        ) from None
    require(
        version == FORMAT,
        f"`format` of {directory} (={version!r}) must be {FORMAT}; save the model again with "
        f"disco_jax {__version__}, or load it with {manifest.get('disco_jax')}",
    )
    return manifest


def check_files(directory: Path, manifest: dict[str, Any], nodes: Iterable[int]) -> None:
    """Refuses a directory whose plan, or weights of these nodes, are not what was saved."""
    for name in (PLAN, *map(weights_file, nodes)):
        require(
            _checksum(directory / name) == manifest["sha256"][name],
            f"`{directory / name}` is not the file that was saved (its checksum differs); copy it "
            "again",
        )


def read_weights(
    model: nnx.Module,
    directory: Path,
    mine: list[int],
    mesh: NodeMesh,
    axes: dict[str, int | None],
) -> None:
    """Fills the variables of a model, one after another, from the files of the nodes ``mine``.

    Raises:
      DiscoError: if the model has other variables than the one saved.
    """
    variables = _variables(model)
    odd = sorted(set(variables) ^ set(axes))
    require(
        not odd,
        f"the network and {directory} differ in {odd[:1]} and {max(len(odd) - 1, 0)} more names; "
        "build the network that was saved",
    )
    with contextlib.ExitStack() as stack:
        files = {
            node: stack.enter_context(safe_open(directory / weights_file(node), "numpy"))
            for node in mine
        }
        for name, variable in variables.items():
            parts = {node: file.get_tensor(name) for node, file in files.items()}
            variable.set_value(_assemble(parts, axes[name], mesh))


def _assemble(
    parts: dict[int, Shaped[np.ndarray, "..."]], axis: int | None, mesh: NodeMesh
) -> jax.Array:
    """The array of which each node holds its part, made of the parts of this process."""
    part = next(iter(parts.values()))
    if axis is None:
        return mesh.put(part)
    size = part.shape[axis]
    shape = [*part.shape]
    shape[axis] *= mesh.nodes

    def cut(index: Any) -> Shaped[np.ndarray, "..."]:
        start, stop, _ = index[axis].indices(shape[axis])
        return np.concatenate([parts[n] for n in range(start // size, stop // size)], axis)

    spec = [None] * axis + [NODE]
    return jax.make_array_from_callback(tuple(shape), mesh.sharding(*spec), cut)
