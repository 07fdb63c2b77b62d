"""Nodes meet, agree and watch each other: every fault is one line that names the node."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from disco_jax.errors import DiscoError
from disco_jax.runtime.peers import EXIT_CODE, Channel, Peers, meet


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gathering(nodes, facts, timeout=10.0, came=None):
    """What ``meet`` gave or raised on each node that came."""
    port, found = free_port(), {}

    def one(node):
        try:
            found[node] = meet(f"127.0.0.1:{port}", nodes, node, facts[node], timeout)
        except DiscoError as error:
            found[node] = str(error)

    threads = [threading.Thread(target=one, args=(n,)) for n in (came or range(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def same(nodes, **more):
    return [{"num_nodes": nodes, **more, "go": {"port": node}} for node in range(nodes)]


def test_all_come_and_learn_what_node_0_says():
    found = gathering(3, same(3))
    assert [sorted(found[n][0]) for n in range(3)] == [[1, 2], [0], [0]]
    assert all(found[n][1] == {"port": 0} for n in range(3))


def test_a_node_that_differs_is_named_to_all():
    facts = same(3, plan="abc")
    facts[2]["plan"] = "xyz"
    found = gathering(3, facts)
    for said in found.values():
        assert "node 2 has `plan` (='xyz'), but node 0 has 'abc'" in said


def test_a_node_that_never_comes_is_named_to_all_in_time():
    start = time.monotonic()
    found = gathering(3, same(3), timeout=1.0, came=[0, 2])
    assert time.monotonic() - start < 5
    assert "node 1 did not come within 1 s" in found[0]
    assert "node 1 did not come within 1 s" in found[2]


def test_node_0_that_never_comes_is_named():
    found = gathering(2, same(2), timeout=1.0, came=[1])
    assert "node 0 at 127.0.0.1:" in found[1]
    assert "did not answer within 1 s" in found[1]


def test_a_number_given_twice_is_refused():
    port = free_port()
    facts, outcome = same(3), []

    def come(node):
        try:
            outcome.append(meet(f"127.0.0.1:{port}", 3, node, facts[node], 10.0))
        except DiscoError as error:
            outcome.append(str(error))

    threads = [threading.Thread(target=come, args=(n,)) for n in (0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all("`node_id` (=1) came twice" in said for said in outcome)


def test_a_port_in_use_is_said():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DiscoError, match="cannot be listened at"):
            meet(f"127.0.0.1:{port}", 2, 0, same(2)[0], 1.0)


NODE = """
import sys, time
from disco_jax.runtime.peers import Peers, meet
port, nodes, node, does = sys.argv[1:]
channels, _ = meet(f"127.0.0.1:{port}", int(nodes), int(node), {"go": {}}, 20.0)
with Peers(int(node), channels, timeout=1.5):
    print("here", flush=True)
    sys.stdin.readline()
    if does == "fail":
        raise ValueError("out of paper")
    time.sleep(0.2 if does == "finish" else 60)
"""


def processes(*does):
    port = str(free_port())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", NODE, port, str(len(does)), str(node), what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, what in enumerate(does)
    ]
    for process in running:
        assert process.stdout.readline() == "here\n"
    for process in running:  # nothing goes wrong before all are there
        process.stdin.write("go\n")
        process.stdin.flush()
    return running


def ends(process, expected):
    _, said = process.communicate(timeout=20)
    assert process.returncode == EXIT_CODE
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert expected in said


@pytest.mark.parametrize("dead", [0, 1])
def test_a_node_that_dies_ends_the_others(dead):
    running = processes("work", "work", "work")
    running[dead].kill()
    for node in {0, 1, 2} - {dead}:
        ends(running[node], f"node {dead} ended without a word")


@pytest.mark.parametrize("stalled", [0, 1])
def test_a_node_that_stalls_ends_the_others(stalled):
    running = processes("work", "work", "work")
    os.kill(running[stalled].pid, signal.SIGSTOP)
    for node in {0, 1, 2} - {stalled}:
        ends(running[node], f"node {stalled} was not heard of for 1.5 s")
    running[stalled].kill()
    running[stalled].communicate()


def test_what_went_wrong_on_one_node_is_said_on_all():
    running = processes("work", "fail", "work")
    for node in (0, 2):
        ends(running[node], "node 1: out of paper")
    assert "ValueError: out of paper" in running[1].communicate()[1]


def test_a_node_that_leaves_early_does_not_leave_the_others_waiting():
    running = processes("work", "finish")
    ends(running[0], "node 1 left 1.5 s ago, and this one is not done")


def test_all_finish_quietly():
    for process in processes("finish", "finish", "finish"):
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0


def test_a_stray_connection_is_not_a_node():
    port, facts, found = free_port(), same(2), {}

    def node_0():
        found[0] = meet(f"127.0.0.1:{port}", 2, 0, facts[0], 20.0)

    thread = threading.Thread(target=node_0)
    thread.start()
    for junk in (b"GET / HTTP/1.1\n", b"5\n", b""):
        for _ in range(100):
            try:
                stray = socket.create_connection(("127.0.0.1", port))
                break
            except OSError:
                time.sleep(0.05)
        stray.sendall(junk)
        stray.close()
    found[1] = meet(f"127.0.0.1:{port}", 2, 1, facts[1], 20.0)
    thread.join(20)
    assert list(found[0][0]) == [1]
    assert list(found[1][0]) == [0]


def test_a_broken_message_is_a_fault():
    a, b = socket.socketpair()
    faults = []
    peers = Peers(0, {1: Channel(a, 5.0)}, timeout=5.0, on_fault=faults.append)
    b.sendall(b"GET / HTTP/1.1\n")
    deadline = time.monotonic() + 5
    while not faults and time.monotonic() < deadline:
        time.sleep(0.01)
    b.close()
    assert "the connection to node 1 broke" in faults[0]
    peers.close()


def pair(**how):
    a, b = socket.socketpair()
    return Peers(0, {1: Channel(a, 5.0)}, timeout=5.0, **how), b


def test_what_node_0_gives_is_what_the_others_take():
    peers, b = pair()
    other = Peers(1, {0: Channel(b, 5.0)}, timeout=5.0)
    given = [[b"", b"\n{}", os.urandom(300_000)], [], [b"x"]]
    for parts in given:
        peers.give(parts)
    assert [other.take() for _ in given] == given
    threads = [threading.Thread(target=p.close) for p in (peers, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)


@pytest.mark.parametrize(
    "junk", [b'{"data": 9}\nshort', b'{"data": 1}\nx{"parts": [2]}\n', b'{"parts": 2}\n']
)
def test_data_that_do_not_add_up_are_a_fault(junk):
    faults = []
    peers, b = pair(on_fault=faults.append)
    b.sendall(junk)
    b.close()
    deadline = time.monotonic() + 5
    while not faults and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "the connection to node 1 broke" in faults[0]
    peers.close()
