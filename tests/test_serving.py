"""Serving from the command line: on several hosts, supervised, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from flax import nnx
from helpers import randomize
from PIL import Image
from test_peers import free_port

import disco_jax as dj
from disco_jax import main, serving
from disco_jax.plan import Program, collectives
from disco_jax.runtime import launch
from disco_jax.runtime.session import Answers
from disco_jax.tasks import Classification

ROOT = Path(__file__).parent.parent
CONFIG = "--config=configs/resnet20_fashion_mnist.py:smoke"
COMMAND = [sys.executable, "-m", "disco_jax.main", CONFIG, "--timeout=60"]
BROKEN = 3
pytestmark = pytest.mark.xdist_group("serving")  # the model below is made once


def freeze(mesh, density=0.5):
    create = dj.models.create
    model = create("resnet8", mesh=mesh, num_classes=10, width=8, in_channels=1, rngs=nnx.Rngs(0))
    randomize(model)
    dj.sparsify.prune(model, density)
    return dj.freeze(model, np.zeros((1, 28, 28, 1), np.float32))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A workdir, images, and the answers that the model gives within this process."""
    folder = tmp_path_factory.mktemp("served")
    frozen = freeze(dj.NodeMesh(2, emulate=True))
    frozen.save(folder / "run" / "packed")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 28, 28), np.uint8)
    (folder / "images").mkdir()
    paths = [folder / "images" / f"{i}.png" for i in range(8)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    paths[BROKEN].write_bytes(b"no image")
    (folder / "images" / "notes.txt").write_text("not served")
    scaled = (pixels[..., None].astype(np.float32) / 255 - 0.286) / 0.353
    scores = np.asarray(jax.nn.softmax(frozen(scaled)))
    expected = [
        {"image": str(p), "class": int(s.argmax()), "score": float(s.max())}
        for p, s in zip(paths, scores, strict=True)
    ]
    return folder, expected


def check(lines, expected):
    answers = [json.loads(line) for line in lines]
    assert [a["image"] for a in answers] == [e["image"] for e in expected]
    for answer, wanted in zip(answers, expected, strict=True):
        if wanted["image"].endswith(f"{BROKEN}.png"):
            assert f"{BROKEN}.png cannot be read (no format" in answer["error"]
        else:
            assert answer["class"] == wanted["class"]
            assert answer["score"] == pytest.approx(wanted["score"], rel=1e-4)


def environment():
    clean = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**clean, "COLUMNS": "200", **root}


def start(*arguments):
    pipe = subprocess.PIPE
    how = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "text": True}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(), **how)


def hosts(workdirs, *arguments):
    """A process for each node, node 0 first."""
    together = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_nodes={len(workdirs)}"]
    return [
        start(*COMMAND, *together, f"--node_id={i}", f"--workdir={w}", *arguments)
        for i, w in enumerate(workdirs)
    ]


def test_two_hosts_answer_as_one_process_does(served):
    folder, expected = served
    images = f"--images={folder / 'images'}"
    running = hosts([folder / "run"] * 2, "--mode=serve", images, "--batch_size=3")
    (out, said), (nothing, said_1) = (r.communicate(timeout=300) for r in running)
    assert [r.returncode for r in running] == [0, 0], said + said_1
    check(out.splitlines(), expected)
    assert nothing == ""
    assert re.search(r"7 images served, 1 unreadable; a batch of 3 in p50 .* images/s", said)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_mpirun_says_who_is_who(served):
    folder, expected = served
    serve = (*COMMAND, "--mode=serve", "--images=-", f"--workdir={folder / 'run'}")
    running = start("mpirun", "-n", "2", "--oversubscribe", *serve)
    out, said = running.communicate("".join(f"{e['image']}\n" for e in expected[:2]), timeout=300)
    assert running.returncode == 0, said
    check(out.splitlines(), expected[:2])


def child(process):
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds children in /proc")
def test_a_killed_node_costs_no_answer_and_repeats_none(served):
    folder, expected = served
    running = hosts([folder / "run"] * 2, "--mode=serve", "--images=-", "--supervise")
    paths = [f"{e['image']}\n" for e in expected]
    running[0].stdin.writelines(paths[:2])
    running[0].stdin.flush()
    lines = [running[0].stdout.readline() for _ in range(2)]
    os.kill(child(running[1]), signal.SIGKILL)
    rest, said = running[0].communicate("".join(paths[2:]), timeout=300)
    nothing, said_1 = running[1].communicate(timeout=300)
    assert [r.returncode for r in running] == [0, 0], said + said_1
    check([*lines, *rest.splitlines()], expected)
    assert nothing == ""
    assert "the process ended with code 3, 10 restarts left" in said
    assert "the process ended with code -9, 10 restarts left" in said_1


def test_different_plans_are_refused_by_name(served, tmp_path):
    folder, _ = served
    freeze(dj.NodeMesh(2, emulate=True), density=0.2).save(tmp_path / "packed")
    images = f"--images={folder / 'images'}"
    running = hosts([folder / "run", tmp_path], "--mode=serve", images)
    for process in running:
        out, said = process.communicate(timeout=300)
        assert (process.returncode, out) == (2, ""), said
        assert re.fullmatch(r"error: node 1 has `plan` \(='\w+'\), but node 0 has .*\n", said)


def test_a_node_that_fails_ends_all_at_once_and_by_name(served, tmp_path):
    folder, _ = served
    shutil.copytree(folder / "run" / "packed", tmp_path / "packed")
    (tmp_path / "packed" / "node-1.safetensors").unlink()
    running = hosts([folder / "run", tmp_path], "--mode=profile")
    said = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [3, 2], said
    assert "error: node 1: `" in said[0]
    assert "node-1.safetensors` cannot be read" in said[0]
    assert all("Traceback" not in text and "***" not in text for text in said)


def test_the_best_class_costs_one_gather_beside_the_plan():
    mesh = dj.NodeMesh(2, emulate=False)
    frozen = freeze(mesh)
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), np.float32)
    compiled = Program(Answers(frozen.model, mesh, Classification())).lower(image).compile()
    found = collectives(compiled)
    assert len(found) == frozen.plan.collectives + 1
    assert sum(c.traffic_bytes for c in found) == frozen.plan.traffic_bytes + 4 * 10


WRONG = {
    "training_on_several_hosts": (
        ("--mode=train", "--coordinator=10.0.0.1:9876", "--num_nodes=2", "--node_id=0"),
        "`--coordinator` (=10.0.0.1:9876) is for --mode=serve and --mode=profile; remove it from "
        "--mode=train",
    ),
    "images_to_train": (("--images=x",), "`--images` (=x) is for --mode=serve; remove it from"),
    "supervised_profile": (("--mode=profile", "--supervise"), "`--supervise` (=True) is for"),
    "restarts_alone": (("--mode=serve", "--restarts=3"), "`--restarts` (=3) is for --supervise"),
    "no_images": (("--mode=serve",), "`--images` is missing; pass a folder, or -"),
    "no_folder": (("--mode=serve", "--images=/nowhere"), "`images` (=/nowhere) is not a folder"),
    "empty_folder": (("--mode=serve", "--images={tmp}"), "holds no images"),
    "half_of_the_hosts": (
        ("--mode=serve", "--images=-", "--coordinator=10.0.0.1:9876", "--num_nodes=2"),
        "`node_id` is missing beside coordinator, num_nodes",
    ),
    "not_frozen": (
        ("--mode=serve", "--images=-", "--workdir={tmp}"),
        "has no packed model; run --mode=freeze there first",
    ),
    "too_many_nodes": (
        ("--mode=profile", "--coordinator=h:1", "--num_nodes=3", "--node_id=0", "--workdir={run}"),
        "`num_nodes` (=3) must be that of the plan in {run}/packed (=2); start 2 processes, or",
    ),
    "no_time": (("--mode=serve", "--timeout=0"), "timeout"),
    "no_batch": (("--mode=serve", "--batch_size=0"), "batch_size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case, served, tmp_path, monkeypatch, capsys):
    for name in (*launch.LAUNCHERS.values(), *launch.KUBERNETES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serving, "_stdout", lambda: print)  # pytest keeps its own
    monkeypatch.chdir(ROOT)
    arguments, message = WRONG[case]
    places = {"tmp": tmp_path, "run": served[0] / "run"}
    with flagsaver.flagsaver():
        code = main.main(["main", CONFIG, *(a.format(**places) for a in arguments)])
    said = capsys.readouterr().err
    assert code == 2
    assert message.format(**places) in said.replace("\n", "")
