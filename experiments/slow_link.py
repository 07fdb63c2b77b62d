"""Several hosts with slow links on one Linux machine: network namespaces behind one switch.

Needs root and ``iproute2``. Every host has its own name, address and interface; its link carries
``mbit`` in each direction.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SWITCH = "disco-switch"
INTERFACE = "disco0"
CGROUPS = Path("/sys/fs/cgroup/cpu")  # version 1
PERIOD_US = 2500  # the kernel wants a quota of a millisecond at least


def sh(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"`{command}` failed: {done.stderr.strip()}; are you root, on Linux?")
    return done.stdout


def name(host: int) -> str:
    return f"disco-host{host}"


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


@contextmanager
def hosts(count: int) -> Iterator[None]:
    """Creates the hosts, connected to one switch; removes them at the end."""
    _remove()
    try:
        sh(f"ip netns add {SWITCH}")
        sh(f"ip -n {SWITCH} link add switch type bridge")
        sh(f"ip -n {SWITCH} link set switch up")
        for host in range(count):
            _add(host, count)
        yield
    finally:
        _remove()


def _add(host: int, count: int) -> None:
    there = name(host)
    sh(f"ip netns add {there}")
    sh(f"ip link add {INTERFACE} netns {there} type veth peer name port{host} netns {SWITCH}")
    sh(f"ip -n {SWITCH} link set port{host} master switch up")
    sh(f"ip -n {there} addr add {address(host)}/24 dev {INTERFACE}")
    sh(f"ip -n {there} link set lo up")
    sh(f"ip -n {there} link set {INTERFACE} up")
    # As Debian does it: the host's own name leads to the loopback, not to its interface.
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {there}"]
    lines += [f"{address(i)} {name(i)}" for i in range(count) if i != host]
    folder = Path("/etc/netns") / there
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts").write_text("\n".join(lines) + "\n")


def _remove() -> None:
    for line in sh("ip netns list").splitlines():
        if line.startswith("disco-"):
            found = line.split()[0]
            sh(f"ip netns pids {found} | xargs -r kill -9")
            sh(f"ip netns del {found}")
            if (CGROUPS / found).exists():
                time.sleep(0.5)  # until the kernel has buried what ran there
                (CGROUPS / found).rmdir()
            shutil.rmtree(Path("/etc/netns") / found, ignore_errors=True)


def limit(count: int, mbit: float, burst: int = 64) -> None:
    """Sets the rate of every link, in both directions; ``burst`` kB may pass faster after a rest.

    With 2 kB, little more than a frame, it is a wire of that rate.
    """
    for host in range(count):
        for namespace, device in ((name(host), INTERFACE), (SWITCH, f"port{host}")):
            sh(
                f"ip netns exec {namespace} tc qdisc replace dev {device} root tbf "
                f"rate {mbit}mbit burst {burst}kb latency 400ms"
            )


def bytes_sent(host: int) -> int:
    """Bytes that a host has sent, frames and headers included."""
    path = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
    return int(sh(f"ip netns exec {name(host)} cat {path}"))


def slow_down(count: int, share: float) -> None:
    """From now on every host has no more than a share of a core, for all it starts together."""
    for host in range(count):
        group = CGROUPS / name(host)
        group.mkdir(exist_ok=True)
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(round(share * PERIOD_US)))


def start(host: int, core: int, command: Sequence[str], **environment: str) -> subprocess.Popen:
    """Runs a command on a host, on one core; its stdin and stdout are pipes."""
    script = f'hostname {name(host)}; exec taskset -c {core} "$@"'
    inside = ["ip", "netns", "exec", name(host), "unshare", "-u", "sh", "-c", script, "sh"]
    tasks = CGROUPS / name(host) / "tasks"  # out of sight in a namespace
    join = ["sh", "-c", f'echo $$ > {tasks}; exec "$@"', "sh"] if tasks.exists() else []
    return subprocess.Popen(
        [*join, *inside, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
        text=True,
    )
