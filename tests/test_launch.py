"""Joining hosts: wrong arguments are refused before anything waits."""

import pytest

from disco_jax import runtime
from disco_jax.errors import DiscoError
from disco_jax.runtime import launch


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*launch.LAUNCHERS.values(), *launch.KUBERNETES):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.1:1", 2), "`node_id` is missing beside coordinator, num_nodes"),
        (("10.0.0.1", 2, 0), "`coordinator` (='10.0.0.1') must be host:port"),
        ((":9876", 2, 0), "`coordinator` (=':9876') must be host:port"),
        (("10.0.0.1:1", 0, 0), "`num_nodes` (=0) must be a positive integer"),
        (("10.0.0.1:1", 2, 2), "`node_id` (=2) must be 0 ... 1"),
        (("10.0.0.1:1", 2, -1), "`node_id` (=-1) must be 0 ... 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(DiscoError) as error:
        runtime.connect(*arguments)
    assert message in str(error.value)


def test_alone_without_arguments():
    runtime.connect()
    assert not runtime.connected()


def test_an_interface_alone_is_refused():
    with pytest.raises(DiscoError, match=r"`interface` .* is for several hosts"):
        runtime.connect(interface="eth0")


def test_too_late_is_said():
    import jax

    jax.devices()
    with pytest.raises(DiscoError, match="`connect` comes too late"):
        runtime.connect("127.0.0.1:9876", 2, 0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "4"}, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
    ],
)
def test_launchers_are_told_apart(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.launcher() == expected
