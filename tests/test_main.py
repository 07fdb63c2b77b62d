"""The command line as a user meets it: subprocesses, exit codes, one line for what is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from disco_jax.config import defaults
from disco_jax.settings import check

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SMOKE = "--config=configs/resnet20_fashion_mnist.py:smoke"


def run(*arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    return subprocess.run(
        [sys.executable, "-m", "disco_jax.main", *arguments],
        cwd=ROOT,
        env={**clean, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


one_worker = pytest.mark.xdist_group("smoke")  # the run below is made once


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """One smoke run of everything."""
    folder = tmp_path_factory.mktemp("smoke")
    done = run(SMOKE, f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    assert "test accuracy: dense" in done.stdout
    assert "communicates what the plan says" in done.stderr
    return folder


@one_worker
def test_all_ends_with_the_packed_accuracy_on_two_devices(workdir):
    report = json.loads((workdir / "report.json").read_text())
    assert report["mesh"] == "NodeMesh(nodes=2, data=1, cpu)"
    assert set(report["accuracy"]) == {"dense", "masked", "packed"}
    assert report["accuracy"]["packed"] == report["accuracy"]["masked"]


@one_worker
@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("eval", r"masked: test accuracy \d+\.\d\d %"),
        ("freeze", r"blocks\.8\.conv2\.exchange"),
        ("infer", r"packed on NodeMesh\(nodes=2, data=1, cpu\): test accuracy \d+\.\d\d %"),
        ("report", r"total, packed"),
        ("train", r"sparse: going on from step 3"),
    ],
)
def test_modes_go_on_from_the_workdir(workdir, mode, says):
    frozen = ("--config.message_bytes=1000",) if mode == "freeze" else ()
    done = run(SMOKE, f"--workdir={workdir}", f"--mode={mode}", *frozen)
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout + done.stderr)
    if frozen:
        assert json.loads((workdir / "packed" / "plan.json").read_text())["message_bytes"] == 1000


WRONG = {
    "no_config": ((), r"`--config` is missing; pass one, such as --config=configs/resnet50.py"),
    "missing_file": (
        ("--config=configs/nothing.py",),
        r"`command line`: there is no file configs/nothing.py; see --help and the config",
    ),
    "unknown_variant": (
        ("--config=configs/resnet50.py:imagnet",),
        r"`command line`: variant 'imagnet' must be one of digits, smoke, imagenet",
    ),
    "unknown_field": (
        (SMOKE, "--config.nodse=4"),
        r"nodse.*Did you mean \"nodes\" instead of \"nodse\"\?; see",
    ),
    "wrong_type": ((SMOKE, "--config.nodes=two"), r"config.nodes.*'two'; see --help"),
    "unknown_mode": ((SMOKE, "--mode=trian"), r"mode.*trian.*should be one of.*all"),
    "unknown_flag": ((SMOKE, "--wordkir=x"), r"wordkir"),
    "stray_word": ((SMOKE, "train"), r"`train` is not a flag; write --name=value"),
    "no_report": (
        (SMOKE, "--mode=report", "--workdir=/nowhere"),
        r"`workdir` \(=/nowhere\) has no report.json; run --mode=all there first",
    ),
    "read_only_workdir": (
        (SMOKE, "--workdir=/proc/disco"),
        r"`workdir` \(=/proc/disco\) cannot be written .*choose another with --workdir",
    ),
    "untrained": (
        (SMOKE, "--mode=infer", "--workdir={tmp}"),
        r"`workdir` has no checkpoint in .*train first \(--mode=train\)",
    ),
    "too_few_devices": (
        (SMOKE, "--config.nodes=3", "--config.emulate=False", "--workdir={tmp}"),
        r"`nodes` \(=3\).*needs 3 devices, but JAX has 1; set JAX_NUM_CPU_DEVICES=3",
    ),
    "missing_data": (
        (SMOKE, "--config.data.source=idx:/nowhere", "--workdir={tmp}"),
        r"needs the file .*install the Debian package dataset-fashion-mnist",
    ),
    "missing_tfds": (
        (SMOKE, "--config.data.source=tfds:imagenet2012", "--workdir={tmp}"),
        r"prepare it with `tfds build imagenet2012 --file_format=array_record`",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case, tmp_path):
    arguments, message = WRONG[case]
    done = run(*(a.format(tmp=tmp_path) for a in arguments), JAX_NUM_CPU_DEVICES="1")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search("error: .*" + message, done.stderr), done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


@one_worker
def test_another_architecture_in_the_workdir(workdir):
    done = run(SMOKE, f"--workdir={workdir}", "--config.model.width=8")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    message = r"`model.width` \(=8\) differs from the checkpoint's \(=16\).*another --workdir"
    assert re.search(message, done.stderr)


@one_worker
def test_another_density_in_the_workdir_is_not_taken_for_the_old_one(workdir):
    done = run(SMOKE, f"--workdir={workdir}", "--mode=eval", "--config.sparse.density=0.5")
    assert done.returncode == 2
    assert re.search(r"`sparse.density` \(=0.5\) differs from the .* \(=0.2\)", done.stderr)


def test_a_report_that_is_not_one(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    done = run(SMOKE, f"--workdir={tmp_path}", "--mode=report")
    assert done.returncode == 2
    assert "run --mode=all there to write it again" in done.stderr
    assert (tmp_path / "report.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, r"`batch_size` \(=0\) must be a positive integer"),
        ({"batch_size": 10, "accumulate": 3}, r"`batch_size` \(=10\) must be divisible by"),
        ({"dense": ConfigDict({"epochs": 0.0})}, r"`dense.epochs` \(=0.0\) must be positive"),
        ({"dense": {"weights": "a", "backbone": "b"}}, r"`dense.backbone` \(=b\) is for training"),
        ({"max_steps": -1}, r"`max_steps` \(=-1\) must be 0"),
        ({"data": {"eval_size": 0}}, r"`eval_batch_size` \(=120\) must be 1 where"),
        ({"eval_batch_size": 7, "data_parallel": 2}, r"`eval_batch_size` \(=7\) must be divis"),
        ({"message_bytes": 12}, r"`message_bytes` \(=12\) must be an integer, a positive"),
        ({"wire_dtype": "int3"}, r"`wire_dtype` \(='int3'\) must be one of"),
        ({"sparse": ConfigDict({"mask_share": 1.0})}, r"`sparse.mask_share` \(=1.0\) must be"),
        ({"sparse": ConfigDict({"density": 2.0})}, r"`density` \(=2.0\) must be between"),
        ({"data": ConfigDict({"mean": (0.1,), "std": (0.0,)})}, r"std must be positive"),
    ],
)
def test_config_values(change, message):
    config = defaults()
    config.update(change)
    with pytest.raises(ValueError, match=message):
        check(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_in_every_variant(path):
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    command = f"python -m disco_jax.main --config=configs/{path.name}"
    assert command in module.__doc__
    for variant in module.VARIANTS:
        config = module.get_config(variant)
        check(config)
        assert set(config) == set(defaults()), "a config adds no fields of its own"
        assert config.name
    assert module.get_config().name
    assert "smoke" in module.VARIANTS
