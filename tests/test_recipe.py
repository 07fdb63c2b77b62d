"""What a config's sparse section selects, on a small network and the embedded digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import disco_jax as dj
from disco_jax.config import defaults
from disco_jax.interop import pretrained
from disco_jax.job import Job
from disco_jax.partition import owned
from disco_jax.tasks import distillation
from disco_jax.trace import exchanges, readers


def config(**sparse):
    c = defaults()
    c.name, c.nodes, c.emulate, c.max_steps = "recipe", 2, True, 4
    c.model.update(name="resnet8", width=4, in_channels=1)
    c.data.update(source="digits", size=8)
    c.batch_size, c.eval_batch_size = 32, 120
    distill = sparse.pop("distill", {})
    c.sparse.update({"every": 1, "calibration_images": 120, **sparse})
    c.sparse.distill.update(distill)
    return c


def open_share(model):
    """Traffic as a share of the dense split's, by the exchanges' costs."""
    kept = dense = 0.0
    costs = dj.sparsify.wire_costs(model, jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32))
    for path, exchange in exchanges(model).items():
        remote = ~np.asarray(owned(exchange.channels, exchange.mesh.nodes))
        kept += costs[path] * (np.asarray(exchange.mask[...]) & remote).sum()
        dense += costs[path] * remote.sum()
    return kept / dense


RECIPES = {
    "gates": {"gates": "hard_concrete", "distill": {"weight": 0.5}},
    "post_training": {"post_training": True, "assignment": "local", "budget": "by_cost"},
    "all": {
        "budget": "by_cost",
        "floor": 0.5,
        "assignment": "local",
        "regrow": "gradient",
        "lasso": 1e-3,
        "distill": {"weight": 0.9, "features": 1.0},
    },
    "reconstruction": {
        "score": "reconstruction",
        "regrow": "feedback",
        "rules": ((r"^blocks\.0", {"density": 0.5}), (r"conv2", {"score": "activation"})),
    },
    "activation": {"score": "activation", "schedule": "linear", "budget": "per_link"},
    "quantised": {"quantise": True, "assignment": "local", "distill": {"weight": 0.5}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_meets_its_budget_and_is_restored(name, tmp_path):
    c = config(density=0.5, **RECIPES[name])
    if c.sparse.budget == "per_link":
        c.sparse.links = ((0, 1), (1, 0))
    if c.sparse.quantise:
        c.wire_dtype, c.wire_rules = "int8", (("conv2", "int4"),)
    job = Job(c, tmp_path)
    job.run_train()
    assert 0.25 < open_share(job.model) <= 0.5 + 1e-6
    assert all(e.gate is None for e in exchanges(job.model).values())
    frozen = job.freeze()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    job.model.eval()
    np.testing.assert_allclose(frozen(x), job.model(x), rtol=1e-4, atol=1e-4)
    again = Job(c, tmp_path)  # as another process would
    again.restore("sparse")
    again.model.eval()
    np.testing.assert_allclose(again.model(x), job.model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [("",), ("^conv$", r"blocks\.0")])
def test_layers_split_by_rows_are_trained_without_masks(rows, tmp_path):
    """All of them, or the early ones, and then the others have masks."""
    c = config(density=0.5, quantise=len(rows) > 1)
    c.rows, c.row_dtype, c.wire_dtype = rows, "float16", "int8"
    job = Job(c, tmp_path)
    job.run_train()
    kept = [float(e.mask[...].mean()) for e in exchanges(job.model).values()]
    assert len(kept) == (5 if len(rows) > 1 else 0)
    assert all(k < 1 for k in kept[:-1])
    frozen = job.freeze()
    job.model.eval()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    np.testing.assert_allclose(frozen(x), job.model(x), rtol=1e-2, atol=1e-2)
    again = Job(c, tmp_path)  # as another process would
    again.restore("sparse")
    np.testing.assert_allclose(again.freeze()(x), frozen(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limits", [{"memory": 0.9}, {"latency_ms": 5.0, "memory": 0.9}])
def test_a_plan_is_made_for_the_trained_model_and_kept(limits, tmp_path):
    """Rows, densities and wire dtypes; another process takes what the first has chosen."""
    c = config(density=0.8, quantise=True)
    c.plan.update(mbit=1.0, link_ms=0.001, gmacs=0.1, wire_dtypes=("int8",), **limits)
    job = Job(c, tmp_path)
    job.run_train()
    frozen = job.freeze()
    kinds = {e.split for e in frozen.plan.exchanges if e.hops}
    assert {"rows", "rows to channels", "channels"} <= kinds
    assert {e.wire_dtype for e in frozen.plan.exchanges if e.split == "rows"} == {"float16"}
    share = frozen.plan.weight_bytes_per_node / frozen.plan.single_node_weight_bytes
    assert share <= 0.9
    again = Job(c, tmp_path)
    again.restore("sparse")
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    np.testing.assert_allclose(again.freeze()(x), frozen(x), rtol=1e-5, atol=1e-5)
    job.restore("sparse")  # which is split already
    np.testing.assert_allclose(job.freeze()(x), frozen(x), rtol=1e-5, atol=1e-5)
    (tmp_path / "splits.json").unlink()
    with pytest.raises(dj.DiscoError, match=r"has no splits\.json, which training writes"):
        Job(c, tmp_path).restore("sparse")


def test_a_plan_leaves_nothing_to_choose_by_hand(tmp_path):
    c = config()
    c.plan.memory, c.wire_dtype = 0.9, "int8"
    with pytest.raises(dj.DiscoError, match="`plan` chooses `rows`, `wire_dtype`"):
        Job(c, tmp_path)


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"score": "l3"}, r"`sparse.score` \(='l3'\) must be one of .*reconstruction"),
        ({"assignment": "global"}, r"`sparse.assignment` \(='global'\) must be one of none, local"),
        ({"gates": "soft"}, r"`sparse.gates` \(='soft'\) must be one of none, hard_concrete"),
        ({"calibration_images": 0}, r"`sparse.calibration_images` \(=0\) must be at least 1"),
        (
            {"post_training": True, "gates": "hard_concrete"},
            r"`sparse.post_training` and `sparse.gates` exclude each other",
        ),
        ({"budget": "cheap"}, r"`budget` \(='cheap'\) must be one of by_cost, per_link, uniform"),
        ({"budget": "per_link"}, r"`links` \(=\[\]\) must have a row and a column for each"),
        ({"schedule": "square"}, r"`schedule` \(='square'\) must be one of"),
        ({"regrow": "always"}, r"`regrow` \(='always'\) must be one of none, gradient, feedback"),
        ({"turnover": 2.0}, r"`turnover` \(=2.0\) must be between 0 and 1"),
        ({"lasso": -1.0}, r"`lasso` \(=-1.0\) must be 0 \(none\) or more"),
        ({"rules": (("nowhere", {"density": 1.0}),)}, r"`rules` entry 'nowhere' is not used"),
        ({"rules": (("", {"budget": 1.0}),)}, r"overrides \['budget'\], but only"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_meant_is_refused_before_training(sparse, message, tmp_path):
    with pytest.raises(dj.DiscoError, match=message):
        Job(config(**sparse), tmp_path)
    assert not list(tmp_path.glob("checkpoints/*/*"))


def test_ranges_come_from_all_calibration_images(tmp_path):
    """Not from the first batch alone."""
    c = config(calibration_images=120)
    c.eval_batch_size, c.wire_dtype = 40, "int8"
    job = Job(c, tmp_path)
    found = job.freeze().model.blocks[0].exchange.scale[...]
    images = job.calibration()
    assert [len(batch) for batch in images] == [40, 40, 40]
    for some, same in ((images, True), (images[:1], False)):
        frozen = dj.freeze(job.model, np.concatenate(some), wire_dtype="int8")
        expected = frozen.model.blocks[0].exchange.scale[...]
        assert np.array_equal(found, expected) == same


def test_dense_weights_from_a_file_start_on_any_number_of_nodes(tmp_path):
    path = tmp_path / "dense.safetensors"
    mesh = dj.NodeMesh(1, emulate=True)
    model = dj.models.create(
        "resnet8", mesh=mesh, width=4, num_classes=10, in_channels=1, rngs=nnx.Rngs(7)
    )
    pretrained.save(model, path)
    c = config()
    c.dense.weights = str(path)
    job = Job(c, tmp_path / "work")
    job.train("dense")
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    model.eval(), job.model.eval()
    np.testing.assert_allclose(job.model(x), model(x), rtol=1e-5, atol=1e-5)


def flat(model):
    """Parameters and statistics by path."""
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): np.array(variable[...]) for path, variable in state}


@pytest.mark.parametrize(
    ("name", "teacher"),
    [("deeplabv3_resnet18", "resnet18"), ("ssd_resnet18", "resnet18"), ("ssd300", "vgg16")],
)
def test_a_backbone_starts_from_a_classifier(name, teacher, tmp_path):
    """All of it, on any number of nodes; the rest stays, and the classifier's head is left out."""
    one, two = dj.NodeMesh(1, emulate=True), dj.NodeMesh(2, emulate=True)
    small = {"hidden": 8} if teacher == "vgg16" else {}
    classifier = dj.models.create(teacher, mesh=one, width=4, rngs=nnx.Rngs(7), **small)
    model = dj.models.create(name, mesh=two, width=4, rngs=nnx.Rngs(0))
    pretrained.save(classifier, tmp_path / "classifier.safetensors")
    before = flat(model)
    pretrained.load_backbone(model, tmp_path / "classifier.safetensors")
    prefix = {"ssd_resnet18": "trunk.backbone.", "ssd300": "trunk.convs."}.get(name, "backbone.")
    theirs = flat(classifier)
    for path, value in flat(model).items():
        if path.startswith(prefix):
            source = path.removeprefix(prefix.removesuffix("convs."))
            np.testing.assert_array_equal(value, theirs[source])
        else:
            np.testing.assert_array_equal(value, before[path])
    with pytest.raises(dj.DiscoError, match="has no backbone that takes"):
        pretrained.load_backbone(classifier, tmp_path / "classifier.safetensors")


class TestPretrained:
    def model(self, nodes=1, width=4, **options):
        mesh = dj.NodeMesh(nodes, emulate=True)
        return dj.models.create(
            "resnet8", mesh=mesh, width=width, num_classes=10, rngs=nnx.Rngs(nodes), **options
        )

    def test_dead_channels_are_fitted(self, tmp_path):
        path, x = tmp_path / "w.safetensors", jax.random.normal(jax.random.key(0), (4, 6))

        class Padded(nnx.Module):
            def __init__(self, nodes, seed):
                mesh, rngs = dj.NodeMesh(nodes, emulate=True), nnx.Rngs(seed)
                self.a = dj.layers.Dense(6, 10, mesh=mesh, pad=True, rngs=rngs)
                self.norm = dj.layers.BatchNorm(10, mesh=mesh, pad=True, rngs=rngs)
                self.b = dj.layers.Dense(10, 6, mesh=mesh, pad=True, rngs=rngs)

            def __call__(self, x):
                return self.b(nnx.relu(self.norm(self.a(x))))

        whole, other, back = Padded(1, 0), Padded(3, 1), Padded(1, 2)
        for model in (whole, other, back):
            model.eval()
        pretrained.save(whole, path)
        pretrained.load(other, path)
        np.testing.assert_allclose(other(x), whole(x), rtol=1e-5, atol=1e-5)
        pretrained.save(other, path)
        pretrained.load(back, path)
        np.testing.assert_allclose(back(x), whole(x), rtol=1e-5, atol=1e-5)

    def test_another_model_is_refused_and_nothing_is_loaded(self, tmp_path):
        path = tmp_path / "w.safetensors"
        pretrained.save(self.model(), path)
        other = self.model(width=8)
        before = np.asarray(other.blocks[0].conv1.kernel[...])
        with pytest.raises(dj.DiscoError, match=r"of another shape: .* instead of"):
            pretrained.load(other, path)
        np.testing.assert_array_equal(other.blocks[0].conv1.kernel[...], before)

    def test_files_that_are_none(self, tmp_path):
        path = tmp_path / "w.safetensors"
        with pytest.raises(dj.DiscoError, match=r"`weights` \(=.*\) cannot be read"):
            pretrained.load(self.model(), path)
        path.write_bytes(b"not weights")
        with pytest.raises(dj.DiscoError, match=r"`weights` \(=.*\) cannot be read"):
            pretrained.load(self.model(), path)


def test_soft_labels_by_hand():
    student, teacher = jnp.array([[0.0, 2.0]]), jnp.array([[2.0, 0.0]])
    p = 1 / (1 + np.exp(-1.0))  # softmax of (2, 0) / 2
    expected = 4 * (2 * p - 1) * 1.0  # T² Σ p log(p/q); log(p/q) = ±1
    got = distillation.soft_labels(student, teacher, 2.0)
    assert float(got) == pytest.approx(expected, rel=1e-6)


def test_the_teacher_is_not_changed_and_a_perfect_student_loses_nothing():
    import optax

    from disco_jax.train.step import Distillation, TrainState, train_step

    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create(
        "resnet8", mesh=mesh, width=4, num_classes=10, in_channels=1, rngs=nnx.Rngs(0)
    )
    teacher = nnx.clone(model)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(teacher)))
    state = TrainState.create(model, optax.sgd(0.1), mesh=mesh, ema=False)
    step = train_step(
        model, optax.sgd(0.1), state, distill=Distillation(teacher, weight=1.0, features=1.0)
    )
    batch = {"image": jnp.ones((4, 8, 8, 1)), "label": jnp.zeros(4, int)}
    for _ in range(2):
        state, loss = step(state, batch)
    assert np.isfinite(loss)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(teacher)))
    same = distillation.features([jnp.ones((2, 3))], [jnp.ones((2, 3))])
    assert float(same) == 0


def test_readers_of_gates_are_named():
    """Labels for optax follow the parameters' names."""
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create(
        "resnet8", mesh=mesh, width=4, num_classes=10, in_channels=1, rngs=nnx.Rngs(0)
    )
    costs = dj.sparsify.wire_costs(model, jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32))
    dj.sparsify.gates.attach(model, "straight_through", costs)
    labels = jax.tree.leaves(dj.sparsify.gates.is_gate(nnx.state(model, nnx.Param)))
    read = sum(bool(layers) for layers in readers(model).values())
    assert labels.count("gates") == read + 1  # and the multiplier
