"""Grafts: exact sizes, known right masks, the published step, masks on disk."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import registry, tree
from ft_jax.errors import UserError
from ft_jax.weights import graft

RNG = np.random.default_rng(0)


def params(seed=None, layers=2, d=4):
    """A tree of stacked layers with an embedding and a head; zeros without a seed."""
    rng = np.random.default_rng(seed)
    make = (lambda *s: jnp.zeros(s)) if seed is None else (lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32))
    return {
        "embed": {"tokens": {"embedding": make(5, d)}},
        "layers": {"mlp": {"kernel": make(layers, d, d), "bias": make(layers, d)}, "norm": {"scale": make(layers, d)}},
        "head": {"kernel": make(d, 3)},
    }


SIZE = 2 * (16 + 4 + 4)


def count(mask):
    return sum(int(m.sum()) for m in mask.values())


@pytest.mark.parametrize("sparsity", [0.0, 1 / SIZE, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_magnitude_mask_has_exactly_k_of_the_largest(sparsity, tied):
    base, tuned = params(0), params(1)
    if tied:
        base = params()  # every change is 1 or 0.25
        tuned = jax.tree.map(lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) % 2 == 0, 1.0, 0.25), base)
    mask = graft.magnitude_mask(base, tuned, sparsity)
    assert set(mask) == {"layers/mlp/kernel", "layers/mlp/bias", "layers/norm/scale"}
    assert count(mask) == round(sparsity * SIZE) and sum(m.size for m in mask.values()) == SIZE
    first, second = tree.flatten(base), tree.flatten(tuned)
    change = {p: np.abs(np.asarray(second[p] - first[p])) for p in mask}
    inside = [x for p, m in mask.items() for x in change[p][m]]
    outside = [x for p, m in mask.items() for x in change[p][~m]]
    assert not inside or not outside or min(inside) >= max(outside)
    assert count(graft.random_mask(base, sparsity, np.random.default_rng(0))) == round(sparsity * SIZE)


def test_graft_ends_are_base_and_tuned_inside_the_layers_only():
    base, tuned = params(0), params(1)
    none = graft.apply_graft(base, tuned, graft.magnitude_mask(base, tuned, 0.0))
    jax.tree.map(np.testing.assert_array_equal, none, base)
    whole = graft.apply_graft(base, tuned, graft.magnitude_mask(base, tuned, 1.0))
    jax.tree.map(np.testing.assert_array_equal, whole["layers"], tuned["layers"])
    np.testing.assert_array_equal(whole["head"]["kernel"], base["head"]["kernel"])
    np.testing.assert_array_equal(whole["embed"]["tokens"]["embedding"], base["embed"]["tokens"]["embedding"])


def test_registered_edit_and_eligible_rules():
    base, tuned = params(0), params(1)
    rules = ((r"layers/norm/.*", False), (r"layers/.*|head/.*", True))
    out = registry.call("edit", "graft", base, tuned, sparsity=1.0, eligible=rules)
    np.testing.assert_array_equal(out["head"]["kernel"], tuned["head"]["kernel"])
    np.testing.assert_array_equal(out["layers"]["norm"]["scale"], base["layers"]["norm"]["scale"])
    np.testing.assert_array_equal(out["layers"]["mlp"]["bias"], tuned["layers"]["mlp"]["bias"])
    with pytest.raises(UserError, match="matches no leaf"):
        graft.magnitude_mask(base, tuned, 0.1, (("layer/.*", True),))


def test_learning_finds_the_known_mask_where_magnitude_is_wrong():
    """Half of the changes help and half harm, and the harmful ones are the larger: the right mask is known."""
    base = params()
    helpful = jax.tree.map(lambda x: jnp.asarray(RNG.random(x.shape) < 0.5), base)
    tuned = jax.tree.map(lambda h: jnp.where(h, 1.0, 2.0), helpful)
    target = jax.tree.map(lambda h: jnp.where(h, 1.0, 0.0), helpful)

    def loss(p, batch):
        off = jax.tree.map(lambda x, t: jnp.sum((x - t) ** 2), p["layers"], target["layers"])
        return sum(jax.tree.leaves(off))

    mask, history = graft.learn_mask(
        base, tuned, loss, itertools.repeat({"x": np.zeros((2, 1))}), lambda p: -float(loss(p, None)),
        sparsity=0.3, steps=3)  # fmt: skip
    right = tree.flatten(helpful)
    for path, m in mask.items():
        np.testing.assert_array_equal(m, np.asarray(right[path]))
    assert history[0]["score"] < history[-1]["score"] == 0 and history[0]["parameters"] == round(0.3 * SIZE)
    assert [h["step"] for h in history] == [0, 1, 2, 3]


def logistic(p, batch):
    h = batch["x"] @ (p["layers"]["mlp"]["kernel"][0] + p["layers"]["mlp"]["kernel"][1])
    logits = (h + p["layers"]["mlp"]["bias"].sum(0)) * p["layers"]["norm"]["scale"].sum(0) @ p["head"]["kernel"]
    return -jax.nn.log_softmax(logits)[jnp.arange(len(batch["y"])), batch["y"]].mean()


def test_one_step_is_the_published_rule_and_micro_batches_average():
    base, tuned, seed, rate = params(0), params(1), 5, 2e5
    x, y = RNG.standard_normal((8, 4)).astype(np.float32), RNG.integers(0, 3, 8)
    start = graft.magnitude_mask(base, tuned, 0.4)
    keys = jax.random.split(jax.random.key(seed), len(start))
    s = {p: jax.random.uniform(k, m.shape) for (p, m), k in zip(start.items(), keys)}
    sigma = {p: jax.nn.sigmoid(v - 10) for p, v in s.items()}
    gamma = {p: start[p] + (1 - 2.0 * start[p]) * sigma[p] for p in start}
    b, t = tree.flatten(base), tree.flatten(tuned)
    soft = tree.nest({p: b[p] + gamma[p] * (t[p] - b[p]) if p in start else b[p] for p in b})
    grads = tree.flatten(jax.grad(logistic)(soft, {"x": x, "y": y}))
    expected = {}
    for p, bit in start.items():
        step = (1 - 2.0 * bit) * grads[p] * (t[p] - b[p]) * sigma[p] * (1 - sigma[p])
        expected[p] = np.round(bit + (1 - 2.0 * bit) * np.asarray(jax.nn.sigmoid(s[p] - rate * step - 10))).astype(bool)
    flips = sum(int((expected[p] != start[p]).sum()) for p in start)
    assert 0 < flips < SIZE
    for micro in (1, 4):
        batch = {"x": x.reshape(micro, 8 // micro, 4), "y": y.reshape(micro, 8 // micro)}
        rising = itertools.count()
        mask, _ = graft.learn_mask(base, tuned, logistic, iter([batch]), lambda p, n=rising: next(n),
                                   sparsity=0.4, steps=1, seed=seed, learning_rate=rate)  # fmt: skip
        for p in start:
            np.testing.assert_array_equal(mask[p], expected[p])


def test_the_best_mask_is_kept():
    base, tuned = params(0), params(1)
    scores = iter([0.5, 0.9, 0.1])
    batch = {"x": np.ones((1, 2, 4), np.float32), "y": np.zeros((1, 2), int)}
    seen = []

    def score(p):
        seen.append(p)
        return next(scores)

    mask, history = graft.learn_mask(base, tuned, logistic, itertools.repeat(batch), score, sparsity=0.2, steps=2)
    jax.tree.map(np.testing.assert_array_equal, graft.apply_graft(base, tuned, mask), seen[1])
    assert [h["score"] for h in history] == [0.5, 0.9, 0.1]


def test_a_found_rate_adds_as_many_parameters_as_asked():
    base, tuned = params(0), params(1)
    x, y = RNG.standard_normal((8, 4)).astype(np.float32), RNG.integers(0, 3, 8)
    batch = {"x": x[None], "y": y[None]}
    start = graft.magnitude_mask(base, tuned, 0.25)
    rising = itertools.count()
    mask, history = graft.learn_mask(base, tuned, logistic, itertools.repeat(batch), lambda p: next(rising), sparsity=0.25,
                                     steps=1, flips=0.5, seed=5)  # fmt: skip
    entered = sum(int((m & ~start[p]).sum()) for p, m in mask.items())
    assert entered == 6  # half of the 12 of the start
    given, _ = graft.learn_mask(base, tuned, logistic, itertools.repeat(batch), lambda p: next(rising), sparsity=0.25, steps=1,
                                learning_rate=history[-1]["learning_rate"], seed=5)  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, given, mask)
    assert history[0]["learning_rate"] is None
    with pytest.raises(UserError, match="no parameter outside the mask lowers the loss"):
        graft.learn_mask(base, tuned, lambda p, b: 0 * p["layers"]["mlp"]["bias"].sum(), itertools.repeat(batch), lambda p: 0.0,
                         sparsity=0.25, steps=1, flips=0.5)  # fmt: skip


def test_one_loss_is_compiled_once_for_every_run():
    base, counts = params(0), []

    def loss(p, batch):
        counts.append(1)
        return logistic(p, batch)

    batch = {"x": np.ones((1, 2, 4), np.float32), "y": np.zeros((1, 2), int)}
    graft.learn_mask(base, params(1), loss, itertools.repeat(batch), lambda p: 0.0, sparsity=0.2, steps=2)
    traced = len(counts)
    graft.learn_mask(base, params(2), loss, itertools.repeat(batch), lambda p: 0.0, sparsity=0.4, steps=2, learning_rate=1e5)
    assert traced and len(counts) == traced


def test_lottery_ticket_is_zero_where_a_graft_has_the_base():
    base, tuned = params(0), params(1)
    mask = graft.magnitude_mask(base, tuned, 0.3)
    ticket, grafted = (tree.flatten(x) for x in (graft.lottery_ticket(tuned, mask), graft.apply_graft(base, tuned, mask)))
    for p, x in tree.flatten(tuned).items():
        if p not in mask:
            np.testing.assert_array_equal(ticket[p], x)  # head and embeddings stay
        else:
            np.testing.assert_array_equal(ticket[p], np.where(mask[p], x, 0))
            np.testing.assert_array_equal(ticket[p][mask[p]], grafted[p][mask[p]])


def test_bias_region_holds_every_eligible_bias():
    mask = graft.bias_mask(params(0))
    assert {p: m.all() for p, m in mask.items()} == {"layers/mlp/kernel": False, "layers/mlp/bias": True, "layers/norm/scale": False}
    assert count(mask) == 8
    with pytest.raises(UserError, match="no bias"):
        graft.bias_mask({"layers": {"mlp": {"kernel": jnp.zeros((2, 3, 3))}}})


@pytest.mark.parametrize("loss,message", [
    (lambda p, batch: jnp.nan * p["layers"]["mlp"]["bias"].sum(), "nan at step 1"),
    (lambda p, batch: jnp.sqrt((0 * p["layers"]["mlp"]["bias"]).sum()), "0.0 at step 1 and its gradient not finite"),
])
def test_a_loss_or_gradient_that_is_not_finite_is_named(loss, message):
    with pytest.raises(UserError, match=message):
        graft.learn_mask(params(0), params(1), loss, itertools.repeat({"x": np.zeros((1, 1))}), lambda p: 0.0,
                         sparsity=0.1, steps=1)  # fmt: skip


def test_mask_on_disk_is_packed_bits(tmp_path):
    mask = {"layers/a/kernel": RNG.random((3, 70, 11)) < 0.5, "layers/a/bias": np.zeros((3, 5), bool)}
    path = tmp_path / "mask.safetensors"
    graft.save_mask(path, mask, {"base": "abc"})
    back = graft.load_mask(path)
    assert set(back) == set(mask)
    for name, m in mask.items():
        assert back[name].dtype == bool
        np.testing.assert_array_equal(back[name], m)
    assert path.stat().st_size < sum(m.size for m in mask.values()) / 8 + 500
    assert [p.name for p in tmp_path.iterdir()] == ["mask.safetensors"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="mask.safetensors: not a graft mask"):
        graft.load_mask(path)
    with pytest.raises(UserError, match="not a graft mask"):
        graft.load_mask(tmp_path / "none")


def test_sizes_shares_and_overlap():
    base, tuned = params(0), params(1)
    mask = graft.magnitude_mask(base, tuned, 0.25)
    assert graft.mask_size(mask) == (12, 0.25)
    rows = graft.mask_shares(mask)
    assert sum(r["parameters"] for r in rows) == 12 and len(rows) == 6 and {r["layer"] for r in rows} == {0, 1}
    whole = graft.magnitude_mask(base, tuned, 1.0)
    assert graft.overlap(mask, whole) == 0.25 and graft.overlap(whole, mask) == 1.0
    assert graft.overlap({p: ~m for p, m in mask.items()}, mask) == 0.0
    with pytest.raises(UserError, match="differ at"):
        graft.overlap(mask, {"layers/mlp/bias": mask["layers/mlp/bias"]})


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan")])
def test_sparsity_is_a_share(sparsity):
    with pytest.raises(UserError, match="not a share"):
        graft.magnitude_mask(params(0), params(1), sparsity)


def test_trees_that_differ_are_named():
    other = params(1)
    other["layers"]["mlp"]["kernel"] = jnp.zeros((2, 4, 5))
    with pytest.raises(UserError, match="differ at 'layers/mlp/kernel'"):
        graft.magnitude_mask(params(0), other, 0.1)
