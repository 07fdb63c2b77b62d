"""Collectives and their bytes, read from a compiled program: no hidden communication."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import jax

from disco_jax.errors import require
from disco_jax.plan.frozen import Frozen
from disco_jax.trace import Images

_KINDS = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|reduce-scatter"
_INSTRUCTION = re.compile(rf"= (\(?.*?) ({_KINDS}|ragged-all-to-all)(?:-start)?\(")
_SHAPE = re.compile(r"([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: its HLO name.
      result_bytes: size of what one participant gets.
      messages: directed (source, target) pairs over which a full operand travels.
      traffic_bytes: bytes over all directed links.
    """

    kind: str
    result_bytes: int
    messages: int
    traffic_bytes: int


def collectives(program: str | jax.stages.Compiled) -> tuple[Collective, ...]:
    """The collectives of a compiled program (``frozen.lower(images).compile()``) in text order.

    A permute moves its operand once for each pair; an all-gather moves each operand to every
    other member of its group. What else there is counts as an all-gather of its operand. A
    collective inside a loop counts as often as the loop runs, and the loops around it.

    Raises:
      DiscoError: if a collective is inside a loop whose number of turns is not known.
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    lines = list(_located(text))
    loops = {body: (where, trips) for where, line in lines for body, trips in _loop(line)}
    found = []
    for where, line in lines:
        match = _INSTRUCTION.search(line)
        if match:
            repeats = 1
            while where in loops:
                where, trips = loops[where]
                repeats *= trips
            require(
                repeats > 0,
                f"the compiled program has a {match.group(2)} in a loop whose number of turns is "
                "not known, so that its bytes are not either; unroll the loop",
            )
            found += [_collective(line, match.group(1), match.group(2))] * repeats
    return tuple(found)


def _located(text: str) -> Iterator[tuple[str, str]]:
    """Every line of a program with the name of the computation that it is in."""
    where = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            where = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
        yield where, line


def _loop(line: str) -> list[tuple[str, int]]:
    """(body, turns) of a while instruction; 0 turns where their number is not known."""
    body = re.search(r" while\(.*body=%?([\w.\-]+)", line)
    if not body:
        return []
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    return [(body.group(1), int(trips.group(1)) if trips else 0)]


def _collective(line: str, result: str, kind: str) -> Collective:
    started = f"{kind}-start(" in line
    shapes = _SHAPE.findall(result)
    if started:  # (operands, results, context): the second array is the result
        shapes = shapes[1:2]
    size = sum(_bytes(dtype, dims) for dtype, dims in shapes)
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        messages = pairs.group(1).count("{") if pairs else 0
        return Collective(kind, size, messages, size * messages)
    groups, members = _groups(line)
    operand = size // members if kind == "all-gather" else size
    messages = groups * members * (members - 1)
    return Collective(kind, size, messages, operand * messages)


def _groups(line: str) -> tuple[int, int]:
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota.group(1)), int(iota.group(2))
    named = re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", line)
    if named:
        sizes = {k: int(v) for k, v in re.findall(r"('\w+')=(\d+)", named.group(1))}
        members = math.prod(sizes[axis] for axis in re.findall(r"'\w+'", named.group(2)))
        return math.prod(sizes.values()) // members, members
    listed = re.search(r"replica_groups=\{(.*?)\}\}", line)
    groups = listed.group(1).split("},") if listed else [""]
    return len(groups), groups[0].count(",") + 1


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(_BITS.findall(dtype)[0])
    count = 1
    for dim in filter(None, dims.split(",")):
        count *= int(dim)
    return count * bits // 8


def verify(frozen: Frozen, images: Images) -> tuple[Collective, ...]:
    """Compiles a frozen model and checks that it communicates what its plan says, to the byte.

    Returns:
      The program's collectives.

    Raises:
      DiscoError: if it is not a frozen model, the number of collectives or their bytes are not the
        plan's, or the nodes are emulated, so that there is nothing to check.
    """
    require(
        isinstance(frozen, Frozen),
        f"`frozen` (={type(frozen).__name__}) must be what dj.freeze or dj.load gives; freeze the "
        "model first",
    )
    mesh = frozen.mesh
    require(
        not mesh.emulated,
        f"`mesh` (={mesh}) has no links to check; freeze(..., mesh=) onto one device per node",
    )
    found = collectives(frozen.lower(images).compile())
    traffic = sum(c.traffic_bytes for c in found)
    planned = frozen.plan.traffic_bytes * images.shape[0]
    require(
        traffic == planned and len(found) == frozen.plan.collectives,
        f"the compiled program has {len(found)} collectives moving {traffic} bytes, but the plan "
        f"says {frozen.plan.collectives} moving {planned}; please report this as a bug",
    )
    return found
