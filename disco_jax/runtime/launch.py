"""Joins the processes of several hosts into one JAX program."""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import sys
from typing import Any

import jax
from jax._src import clusters, distributed, xla_bridge  # what has no public name
from jax._src.lib import _jax

from disco_jax.errors import require
from disco_jax.heap import share_one_heap
from disco_jax.runtime import peers
from disco_jax.runtime.peers import Facts, Peers
from disco_jax.version import __version__

# Launchers that jax.distributed reads the coordinator and the ranks from, and how many processes
# each of them says there are.
LAUNCHERS = {"slurm": "SLURM_NTASKS", "ompi": "OMPI_COMM_WORLD_SIZE"}
KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")


def launcher() -> str | None:
    """The launcher that started this process as one of several: slurm, ompi, k8s or None."""
    for name, size in LAUNCHERS.items():
        if os.environ.get(size, "1") != "1":
            return name
    return "k8s" if all(name in os.environ for name in KUBERNETES) else None


def connected() -> bool:
    """Whether this process is one of several."""
    return distributed.global_state.client is not None


def connect(
    coordinator: str | None = None,
    num_nodes: int | None = None,
    node_id: int | None = None,
    *,
    interface: str | None = None,
    timeout: float = 60,
    facts: Facts | None = None,
) -> Peers:
    """Makes this process one node of several; call it before anything else of JAX.

    Every host runs the same program. Without arguments the launcher (SLURM, Open MPI, Kubernetes)
    is asked; where there is none either, the process stays alone. On CPUs the nodes talk through
    the address by which this host reaches the coordinator, whatever its own name resolves to.

    From then on a node that dies, stalls or fails ends the process of every other within
    ``timeout``, with one line that names it and exit code 3; so close what is returned, or use it
    in a ``with``.

    Args:
      coordinator: ``host:port`` of node 0, where the port must be free.
      num_nodes: how many processes there are.
      node_id: which of them this is, from 0.
      interface: the network interface to talk through instead, ``"eth0"`` say.
      timeout: seconds to wait for the others, and after which a silent one counts as lost.
      facts: what else must be the same on every node, the plan's checksum say.

    Raises:
      DiscoError: if one of the three arguments is missing or wrong, JAX is running already, the
        others do not come in time, or they differ in version, ``num_nodes`` or ``facts``.
    """
    place = find(coordinator, num_nodes, node_id, interface=interface, timeout=timeout)
    if place is None:
        return Peers(0, {}, timeout=timeout)
    coordinator, num_nodes, node_id = place
    require(
        not xla_bridge.backends_are_initialized(),
        "`connect` comes too late: JAX has computed something already; call "
        "disco_jax.runtime.connect first",
    )
    agreed = {"num_nodes": num_nodes, "disco_jax": __version__, "jax": jax.__version__}
    agreed |= dict(facts or {})
    channels, go = peers.meet(
        coordinator, num_nodes, node_id, {**agreed, "go": {"jax_port": _free_port()}}, timeout
    )
    config: Any = jax.config
    if config.jax_num_cpu_devices < 1 and "JAX_NUM_CPU_DEVICES" not in os.environ:
        config.update("jax_num_cpu_devices", 1)  # a process is a node, not several
    jax.distributed.initialize(
        f"{coordinator.rpartition(':')[0]}:{go['jax_port']}",
        num_nodes,
        node_id,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=int(10 * timeout),  # the peers are faster, and say who
    )
    _talk_through(interface, coordinator)
    share_one_heap()
    joined = Peers(node_id, channels, timeout=timeout)
    atexit.register(_leave, joined)
    return joined


def _leave(joined: Peers) -> None:
    """At exit JAX waits for all, for minutes, and aborts; after a fault nobody comes."""
    state = distributed.global_state
    if joined.failed:
        for kept in (state.client, state.service):  # their destructors would wait as well
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        state.client = state.service = None


def find(
    coordinator: str | None = None,
    num_nodes: int | None = None,
    node_id: int | None = None,
    *,
    interface: str | None = None,
    timeout: float = 60,
) -> tuple[str, int, int] | None:
    """The arguments of :func:`connect`, or what the launcher says of them; None where it is alone.

    Raises:
      DiscoError: if one of the arguments is missing or wrong.
    """
    if not _asked_for(coordinator, num_nodes, node_id, interface):
        return None
    if coordinator is None:
        coordinator, num_nodes, node_id, _ = (
            clusters.ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, launcher(), int(timeout)
            )
        )
    _check(coordinator, num_nodes, node_id)
    assert coordinator is not None
    assert num_nodes is not None
    assert node_id is not None
    return coordinator, num_nodes, node_id


def _asked_for(coordinator: Any, num_nodes: Any, node_id: Any, interface: str | None) -> bool:
    """Whether there are to be several processes; refuses half of the arguments."""
    given = {"coordinator": coordinator, "num_nodes": num_nodes, "node_id": node_id}
    missing = [name for name, value in given.items() if value is None]
    alone = len(missing) == len(given) and launcher() is None
    require(
        not alone or interface is None,
        f"`interface` (={interface!r}) is for several hosts; pass coordinator=, num_nodes= and "
        "node_id= as well, or start the program with srun or mpirun",
    )
    require(
        len(missing) in (0, len(given)),
        f"`{missing and missing[0]}` is missing beside "
        f"{', '.join(n for n in given if n not in missing)}; pass all of coordinator, num_nodes "
        "and node_id, or none of them under SLURM, Open MPI or Kubernetes",
    )
    return not alone


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _check(coordinator: Any, num_nodes: Any, node_id: Any) -> None:
    host, _, port = str(coordinator).rpartition(":")
    require(
        bool(host) and port.isdigit(),
        f"`coordinator` (={coordinator!r}) must be host:port; pass node 0's address with a free "
        "port, such as 10.0.0.1:9876",
    )
    require(
        isinstance(num_nodes, int) and num_nodes >= 1,
        f"`num_nodes` (={num_nodes!r}) must be a positive integer: how many processes there are",
    )
    require(
        isinstance(node_id, int) and 0 <= node_id < num_nodes,
        f"`node_id` (={node_id!r}) must be 0 ... {num_nodes - 1} (num_nodes - 1), another on each "
        "host",
    )


def _talk_through(interface: str | None, coordinator: str) -> None:
    """Gives gloo an address: left alone it takes what the host's name resolves to, which on many
    systems is the loopback, where no other host answers."""
    where = {"interface": interface} if interface else {"hostname": route_to(coordinator)}

    def make_client() -> Any:
        client, before = distributed.global_state.client, _threads()
        gloo = _jax.make_gloo_tcp_collectives(distributed_client=client, **where)
        for thread in _threads() - before:
            _let_others_finish(thread)
        return xla_bridge.make_cpu_client(gloo)

    config: Any = jax.config
    if config.jax_cpu_collectives_implementation == "gloo":
        xla_bridge.register_backend_factory("cpu", make_client, priority=0, fail_quietly=False)


def _threads() -> set[int]:
    """The threads of this process, on Linux."""
    return set(map(int, os.listdir("/proc/self/task"))) if sys.platform == "linux" else set()


def _let_others_finish(thread: int) -> None:
    """Makes a thread wait, when it wakes, for the one that has its core.

    gloo's thread wakes with every message. On a core that it shares it would interrupt the thread
    that has just locked the connection, and spin on that lock until the scheduler's next tick: a
    message of 0.1 ms then takes up to 3 ms.
    """
    os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def route_to(coordinator: str) -> str:
    """This host's own address on the way to the coordinator.

    >>> route_to("127.0.0.1:9876")
    '127.0.0.1'
    """
    host, _, port = coordinator.rpartition(":")
    family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # of UDP: nothing is sent
        return probe.getsockname()[0]
