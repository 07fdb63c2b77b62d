"""Training: exact resumption, accumulation, averages, precision, and loss that is not finite."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close

import disco_jax as dj
from disco_jax.config import defaults
from disco_jax.job import Job
from disco_jax.plan.frozen import mesh_of
from disco_jax.train.checkpoint import Checkpoints
from disco_jax.train.step import TrainState, train_step


def tiny_config(**overrides):
    c = defaults()
    c.name = "tiny"
    c.model.update(name="resnet8", width=4, in_channels=1)
    c.data.update(source="digits", size=8, train_transforms=("random_crop",))
    c.batch_size, c.max_steps = 32, 6
    c.optimizer.ema_decay = 0.9
    c.sparse.every = 2
    c.checkpoint.every_epochs = 3 / 40  # every third step
    c.update(overrides)
    return c


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(x["phase"], x["step"]): x["loss"] for x in lines if "accuracy" not in x}


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, after):
    """Lets the loop take ``after`` steps in all, then fails as a power cut would."""
    taken = []

    def failing(*args, **kwargs):
        step = train_step(*args, **kwargs)

        def run(state, batch):
            taken.append(1)
            if len(taken) > after:
                raise Interrupted
            return step(state, batch)

        return run

    monkeypatch.setattr("disco_jax.train.loop.train_step", failing)


def test_resume_is_exact(tmp_path, monkeypatch):
    """The same losses, weights and masks as without an interruption, in both phases."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    reference = Job(tiny_config(), whole)
    reference.run_train()
    for after in (5, 3 + 4):  # in the middle of the dense phase, then of the sparse one
        interrupt(monkeypatch, after)
        with pytest.raises(Interrupted):
            Job(tiny_config(), parts).run_train()
        monkeypatch.undo()
    resumed = Job(tiny_config(), parts)
    resumed.run_train()
    expected, got = losses(whole), losses(parts)
    assert {phase for phase, _ in expected} == {"dense", "sparse"}
    assert got == {**got, **expected}
    for a, b in zip(
        jax.tree.leaves(nnx.state(resumed.model)),
        jax.tree.leaves(nnx.state(reference.model)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def one_step(model, tx, images, labels, **kwargs):
    state = TrainState.create(model, tx, mesh=mesh_of(model), ema=kwargs.get("ema_decay", 0) > 0)
    step = train_step(model, tx, state, **kwargs)
    state, loss = step(state, {"image": images, "label": labels})
    return state, loss


def batch(count=8):
    images = np.random.default_rng(0).normal(size=(count, 8, 8, 1)).astype(np.float32)
    return images, np.arange(count) % 10


def resnet(mesh, **kwargs):
    return dj.models.create(
        "resnet8", mesh=mesh, num_classes=10, width=4, in_channels=1, rngs=nnx.Rngs(0), **kwargs
    )


def test_dropout_goes_on_as_without_an_interruption(tmp_path):
    """A checkpoint has the random numbers' keys, placed as the program wants them."""

    class Net(nnx.Module):
        def __init__(self):
            self.mesh = dj.NodeMesh(1, emulate=True)
            self.head = dj.layers.Dense(64, 10, mesh=self.mesh, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.head(self.dropout(x.reshape(len(x), -1)))

    model, (images, labels) = Net(), batch()
    tx = optax.sgd(0.1)
    state = TrainState.create(model, tx, mesh=model.mesh, ema=False)
    step = train_step(model, tx, state)
    state, _ = step(state, {"image": images, "label": labels})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, data={}, settings={})
    _, expected = step(state, {"image": images, "label": labels})
    like = TrainState.create(model, tx, mesh=model.mesh, ema=False)
    restored, _ = checkpoints.restore(like, settings={})
    checkpoints.close()
    step = train_step(model, tx, restored)
    _, loss = step(restored, {"image": images, "label": labels})
    assert loss == expected


@pytest.mark.parametrize("data", [1, 2])
def test_step_is_the_same_on_the_mesh_and_emulated(data):
    images, labels = batch()
    found = []
    for mesh in (dj.NodeMesh(2, data=data, emulate=False), dj.NodeMesh(2, emulate=True)):
        tx = dj.sparsify.sparse_exchange(optax.sgd(0.1), density=0.5, steps=0, schedule="one_shot")
        state, loss = one_step(resnet(mesh), tx, images, labels)
        found.append((float(loss), state))
    close(found[0][0], found[1][0], 1e-5)
    for a, b in zip(*(jax.tree.leaves((s.params, s.rest)) for _, s in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_accumulation_equals_one_large_batch():
    """Without batch statistics the mean gradient of two halves is that of the whole."""
    mesh = dj.NodeMesh(2, emulate=True)

    def dense():
        return dj.layers.Dense(6, 4, mesh=mesh, rngs=nnx.Rngs(0))

    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    y = np.arange(8) % 4
    whole, _ = one_step(dense(), optax.sgd(0.1), x, y)
    model = dense()
    tx = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    state = TrainState.create(model, tx, mesh=mesh, ema=False)
    step = train_step(model, tx, state)
    for half in (slice(0, 4), slice(4, 8)):
        state, _ = step(state, {"image": x[half], "label": y[half]})
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
        close(a, b, 1e-6)


def test_moving_average_by_hand():
    images, labels = batch()
    model = resnet(dj.NodeMesh(2, emulate=True))
    before = np.asarray(model.head.kernel[...])
    state, _ = one_step(model, optax.sgd(0.5), images, labels, ema_decay=0.99)
    after = state.params["head"]["kernel"][...]
    # The first decay is min(0.99, 1/10).
    close(state.ema["head"]["kernel"][...], 0.1 * before + 0.9 * np.asarray(after), 1e-6)


def test_moving_average_waits_while_gradients_accumulate():
    images, labels = batch()
    model = resnet(dj.NodeMesh(2, emulate=True))
    before = np.asarray(model.head.kernel[...])
    tx = optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation()
    state = TrainState.create(model, tx, mesh=mesh_of(model), ema=True)
    step = train_step(model, tx, state, ema_decay=0.99, accumulate=2)
    state, _ = step(state, {"image": images, "label": labels})
    close(state.ema["head"]["kernel"][...], before, 0)
    state, _ = step(state, {"image": images, "label": labels})
    after = np.asarray(state.params["head"]["kernel"][...])
    close(state.ema["head"]["kernel"][...], 0.1 * before + 0.9 * after, 1e-6)


def test_mixed_precision_keeps_float32_weights():
    images, labels = batch()
    model = resnet(dj.NodeMesh(2, emulate=False), dtype=jnp.bfloat16)
    assert model(jnp.asarray(images)).dtype == jnp.bfloat16
    state, loss = one_step(model, optax.sgd(0.1), images, labels)
    assert loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_loss_that_is_not_finite_is_an_error_and_keeps_the_checkpoints(tmp_path):
    config = tiny_config()
    config.checkpoint.every_epochs = 1 / 40
    # Rate 0 at first, then one that destroys the weights, though not yet the loss.
    config.optimizer.update(warmup_epochs=1 / 40, ema_decay=0.0, weight_decay=0.0)
    config.dense.learning_rate = 1e38
    message = r"`loss` or weights \(=(nan|inf)\) at step 2 of phase 'dense'.*lower dense.learning"
    with pytest.raises(dj.DiscoError, match=message):
        Job(config, tmp_path).run_train()
    assert [p.name for p in (tmp_path / "checkpoints" / "dense").iterdir()] == ["1"]
    job = Job(config, tmp_path)
    state = TrainState.create(job.model, job.phase("dense").tx, mesh=job.mesh, ema=False)
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "dense")
    state, _ = checkpoints.restore(state, settings=job.settings("dense"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_keeps_only_the_newest_checkpoints(tmp_path):
    config = tiny_config()
    config.checkpoint.update(keep=1, every_epochs=1 / 40)
    Job(config, tmp_path).train("dense")
    assert [p.name for p in (tmp_path / "checkpoints" / "dense").iterdir()] == ["6"]


def test_report_says_what_the_plan_says(tmp_path):
    job = Job(tiny_config(), tmp_path)
    job.run_all()
    report = json.loads((tmp_path / "report.json").read_text())
    plan = dj.CommunicationPlan.from_json((tmp_path / "plan.json").read_text())
    total = report["total"]
    assert total["packed"]["traffic_bytes"] == plan.traffic_bytes
    assert sum(r["traffic_bytes"] for r in report["exchanges"]) == plan.traffic_bytes
    assert sum(r["macs_per_node"] for r in report["exchanges"]) == plan.macs_per_node
    assert total["dense_split"]["macs_per_node"] * 2 == total["one_node"]["macs_per_node"]
    assert report["accuracy"]["packed"] == report["accuracy"]["masked"]
    assert set(report["seconds"]) >= {"train_dense", "train_sparse", "freeze", "evaluate_packed"}
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "traffic.png").stat().st_size > 1000
