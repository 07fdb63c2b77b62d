"""A supervisor gives every item to a process until one has answered it, and says it once."""

import sys
import time

import pytest

from disco_jax.runtime import supervise
from disco_jax.runtime.supervise import Supervisor

# Answers items in capitals; dies in its own way when it has answered enough, if any are left.
CHILD = """
import os, signal, sys
enough, way = int(sys.argv[1]), sys.argv[2]
for done, line in enumerate(sys.stdin):
    if done == enough:
        if way == "half a line":
            os.write(1, line[:1].upper().encode())
        if way.isdigit():
            os._exit(int(way))
        os.kill(os.getpid(), signal.SIGKILL)
    os.write(1, line.upper().encode())
"""
ITEMS = [f"item {i}" for i in range(7)]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(supervise, "LONGEST_PAUSE", 0.01)


def run(enough, way, items=ITEMS, restarts=9, ahead=3):
    said = []
    command = [sys.executable, "-c", CHILD, str(enough), way]
    code = Supervisor(command, items, said.append, restarts=restarts, ahead=ahead).run()
    return code, said


@pytest.mark.parametrize("way", ["killed", "3", "half a line"])
@pytest.mark.parametrize("ahead", [1, 3, 99])
def test_every_item_is_answered_once_and_in_order(way, ahead):
    assert run(2, way, ahead=ahead) == (0, [item.upper() for item in ITEMS])


def test_nothing_is_started_again_without_need():
    assert run(99, "killed", restarts=0) == (0, [item.upper() for item in ITEMS])


def test_no_items_are_no_reason_to_fail():
    assert run(99, "killed", items=[]) == (0, [])


def test_a_command_is_told_that_it_is_started_again():
    told = "import os, sys\nfor line in sys.stdin: print(line.strip(), *sys.argv[1:]); os._exit(3)"
    command, said = [sys.executable, "-uc", told], []
    again = ["--go-on"]
    Supervisor(command, ["a", "b"], said.append, restarts=2, ahead=2, again=again).run()
    assert said == ["a", "b --go-on"]


def test_items_that_break_off_are_answered_before_the_error():
    def items():
        yield from "ab"
        raise OSError("unplugged")

    said = []
    command = [sys.executable, "-c", CHILD, "1", "killed"]
    with pytest.raises(OSError, match="unplugged"):
        Supervisor(command, items(), said.append, restarts=2, ahead=9).run()
    assert said == ["A", "B"]


def test_wrong_use_is_not_tried_again():
    assert run(2, "2") == (2, ["ITEM 0", "ITEM 1"])


@pytest.mark.parametrize(("way", "code"), [("killed", 137), ("3", 3)])
def test_restarts_come_to_an_end(way, code):
    assert run(1, way, restarts=2) == (code, ["ITEM 0", "ITEM 1", "ITEM 2"])


def test_items_that_come_late_reach_the_process_of_then():
    def slowly():
        for item in ITEMS:
            time.sleep(0.1)
            yield item

    assert run(3, "killed", items=slowly()) == (0, [item.upper() for item in ITEMS])
