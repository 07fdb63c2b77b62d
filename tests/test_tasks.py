"""Detection, segmentation and super-resolution from the command line to answers and pictures."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomize
from PIL import Image

import disco_jax as dj
from disco_jax import pictures, runtime, tasks
from disco_jax.config import defaults
from disco_jax.data import sources
from disco_jax.data.pipeline import evaluation_batches
from disco_jax.data.preprocess import Preprocess
from disco_jax.errors import DiscoError
from disco_jax.tasks.detection import detect
from disco_jax.tasks.task import Task

ROOT = Path(__file__).parent.parent
GREY = ((0.0,) * 3, (1.0,) * 3)
MODELS = {
    "detection": ("ssd_resnet18", {"width": 4, "num_classes": 3, "extra": 2}),
    "segmentation": (
        "deeplabv3_resnet18",
        {"width": 4, "num_classes": 3, "head_width": 4, "output_stride": 16},
    ),
    "super_resolution": ("edsr", {"width": 4, "depth": 1}),
}
TASKS: dict[str, Task] = {
    "detection": tasks.Detection(3, min_score=0.0),
    "segmentation": tasks.Segmentation(3),
    "super_resolution": tasks.SuperResolution(2, *GREY),
}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path, pixels


def frozen_model(kind, pixels):
    name, options = MODELS[kind]
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create(name, mesh=mesh, rngs=nnx.Rngs(0), **options)
    randomize(model)
    return dj.freeze(model, jnp.asarray(pixels[None] / 255, jnp.float32))


@pytest.mark.parametrize("kind", MODELS)
def test_a_session_says_what_the_model_answers(kind, photo, tmp_path):
    path, pixels = photo
    frozen, task = frozen_model(kind, pixels), TASKS[kind]
    preprocess = Preprocess(0 if kind == "super_resolution" else 64, (), *GREY)
    with runtime.connect() as peers:
        session = runtime.Session(frozen, preprocess, peers, task=task, output=tmp_path)
        answer, broken = session.answers([str(path), "nowhere.png"])
    outputs = frozen(jnp.asarray(pixels[None] / 255, jnp.float32))
    assert "is not a file" in broken["error"]
    if kind == "detection":
        found = jax.tree.map(lambda x: np.asarray(x[0]), detect(outputs, min_score=0.0))
        real = found["classes"] >= 0
        assert [o["class"] for o in answer["objects"]] == found["classes"][real].tolist()
        np.testing.assert_allclose(answer["objects"][0]["box"], found["boxes"][0], atol=1e-4)
        return
    written = np.asarray(Image.open(answer["written"]))
    if kind == "segmentation":
        np.testing.assert_array_equal(written, np.argmax(outputs[0], -1))
        assert sum(answer["shares"].values()) == pytest.approx(1, abs=1e-3)
    else:
        expected = np.round(255 * np.clip(outputs[0], 0, 1))
        assert np.abs(written - expected).max() <= 1  # a half may be rounded either way
        assert (answer["height"], answer["width"]) == (128, 128)


def test_a_mask_is_of_the_image_alone(photo, tmp_path):
    """What fills it up to a square is neither counted nor drawn; equal names do not collide."""
    _, pixels = photo
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels[:32]).save(tmp_path / folder / "low.png")
    paths = [str(tmp_path / folder / "low.png") for folder in ("a", "b")]
    with runtime.connect() as peers:
        session = runtime.Session(
            frozen_model("segmentation", pixels),
            Preprocess(48, ("fit",), *GREY),
            peers,
            batch_size=2,
            task=TASKS["segmentation"],
            output=tmp_path,
        )
        answers = list(session.answers(paths))
    assert len({a["written"] for a in answers}) == 2
    for answer in answers:
        written = np.asarray(Image.open(answer["written"]))
        assert written.shape == (24, 48)
        shares = np.bincount(written.ravel(), minlength=3) / written.size
        assert answer["shares"] == {str(c): round(s, 4) for c, s in enumerate(shares) if s}


@pytest.mark.parametrize("overwrite", [True, False])
def test_pictures_of_an_earlier_session_are_replaced_or_kept(photo, tmp_path, overwrite):
    path, pixels = photo
    model, output = frozen_model("segmentation", pixels), tmp_path / "pictures"
    output.mkdir()
    written = []
    for _ in range(2):
        with runtime.connect() as peers:
            session = runtime.Session(
                model,
                Preprocess(64, (), *GREY),
                peers,
                task=TASKS["segmentation"],
                output=output,
                overwrite=overwrite,
            )
            written += [Path(a["written"]).name for a in session.answers([str(path)] * 2)]
    first = [f"{path.stem}.png", f"{path.stem}-2.png"]
    later = first if overwrite else [f"{path.stem}-3.png", f"{path.stem}-4.png"]
    assert written == first + later


def test_batches_of_any_size_are_refused(photo):
    frozen = frozen_model("super_resolution", photo[1])
    with runtime.connect() as peers, pytest.raises(DiscoError, match=r"`batch_size` .*must be 1"):
        runtime.Session(frozen, Preprocess(0, (), *GREY), peers, batch_size=2)


@pytest.mark.parametrize(
    ("kind", "source", "preprocess"),
    [
        ("classification", "digits", Preprocess(8, ("rgb",), *GREY)),
        ("detection", "scenes", Preprocess(64, (), *GREY)),
        ("segmentation", "segments", Preprocess(64, (), *GREY)),
        ("super_resolution", "samples", Preprocess(0, ("degrade",), *GREY, 2)),
    ],
)
def test_contact_sheets(kind, source, preprocess, tmp_path):
    """A picture with a column for each model; the truth itself is drawn as an answer."""
    data = sources.load(source, "test")
    batch = next(evaluation_batches(data, preprocess, 2))
    boxes = jnp.asarray([[0.1, 0.1, 0.5, 0.5]])
    answers = {
        "classification": lambda: np.eye(10)[batch["label"]],
        "detection": lambda: {
            "scores": jnp.eye(11)[jnp.array([[3], [4]])] * 9,
            "offsets": jnp.zeros((2, 1, 4)),
            "boxes": boxes,
        },
        "segmentation": lambda: np.eye(11)[batch["mask"]],
        "super_resolution": lambda: batch["target"],
    }
    facts = {"num_classes": data.num_classes, "mean": GREY[0], "std": GREY[1], "scale": 2}
    path, task = tmp_path / "pictures.png", tasks.make(kind, {}, facts)
    answer = answers[kind]()
    pictures.write(task, preprocess, batch, {"dense": answer, "packed": answer}, path)
    cells = pictures.CELLS[type(task)](task, preprocess, batch, {"dense": answer}, 0)
    assert {"image", "truth", "dense"} <= set(cells)
    if kind in ("segmentation", "super_resolution"):
        np.testing.assert_array_equal(cells["dense"][0], cells["truth"][0])
    assert Image.open(path).width > 300


def test_a_task_takes_what_it_has_use_for():
    config = defaults()
    config.optimizer.label_smoothing = 0.1
    assert tasks.of(config, 10) == tasks.Classification(0.1)
    config.task.update(name="segmentation", auxiliary_weight=0.2)
    assert tasks.of(config, 7) == tasks.Segmentation(7, auxiliary_weight=0.2)
    with pytest.raises(DiscoError, match=r"`task.name` \(='parsing'\) must be one of"):
        tasks.make("parsing", {}, {})
    with pytest.raises(DiscoError, match=r"does not have sharpness, but auxiliary_weight, ignore"):
        tasks.make("segmentation", {"sharpness": 1}, {"num_classes": 3})
    config.task = {"name": "super_resolution", "scale": 2}
    with pytest.raises(DiscoError, match=r"`task.scale` \(=2\) must be `model.scale` \(=1\)"):
        tasks.of(config, 0)


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_tasks_are_hashable_and_named(kind):
    """They are static arguments of compiled functions, and name the metric of a report."""
    facts = {"num_classes": 3, "mean": GREY[0], "std": GREY[1], "scale": 2}
    task = tasks.make(kind, {}, facts)
    assert hash(task) == hash(dataclasses.replace(task))
    assert task.unit in ("%", "dB")


@pytest.mark.xdist_group("edsr")
def test_super_resolution_from_training_to_a_served_folder(tmp_path, photo):
    """`--mode=all`, `freeze` and `serve` of a config, as a user runs them."""
    command = [sys.executable, "-m", "disco_jax.main", "--config=configs/edsr.py:smoke"]
    command += [f"--workdir={tmp_path}", "--config.model.depth=1"]

    def run(*flags):
        return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metric"] == "PSNR"
    assert set(report["PSNR"]) == {"dense", "masked", "packed"}
    assert report["PSNR"]["packed"] == pytest.approx(report["PSNR"]["masked"], abs=1e-3)
    assert "test PSNR: dense" in done.stdout
    assert Image.open(tmp_path / "pictures.png").width > 300
    assert run("--mode=freeze").returncode == 0
    served = run("--mode=serve", f"--images={photo[0].parent}", f"--output={tmp_path / 'large'}")
    assert served.returncode == 0, served.stderr
    (answer,) = map(json.loads, served.stdout.splitlines())
    assert Image.open(answer["written"]).size == (128, 128)
