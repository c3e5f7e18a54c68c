"""Banks, skills and experts against one adapter at a time, numpy restatements and PEFT's Polytropon."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import kernels, masks, registry, tree
from ft_jax.errors import UserError
from ft_jax.kernels import mixture
from tests.helpers import inputs, make_batch, make_model, make_params

COUNTS = {
    "bank": lambda d_in, d_out, adapters, rank, **_: adapters * rank * (d_in + d_out),
    "polytropon": lambda d_in, d_out, tasks, skills, rank: tasks * skills + skills * rank * (d_in + d_out),
    "mhr": lambda d_in, d_out, tasks, skills, splits, rank, **_: tasks * splits * skills + skills * rank * (d_in + d_out),
    "mhr_z": lambda d_in, d_out, tasks, **_: tasks * 2 * 3,  # splits and skills of `trees.PARENTS`
    "mhr_mu": lambda d_in, d_out, **_: 4 * (d_in + d_out),
    "meteora": lambda d_in, d_out, **_: 3 * d_in,
    "loramoe": lambda d_in, d_out, experts, rank, **_: experts * (d_in + rank * (d_in + d_out)),
}
D_IN, D_OUT, LAYERS = 24, 16, 3
ROUTED = ["bank(adapters=5, rank=4)", "polytropon(tasks=5, skills=3, rank=4)", "mhr(tasks=5, skills=3, splits=2, rank=4)"]


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def put(text, w, seed=0):
    return kernels.adapt({"w": {"kernel": jnp.asarray(w)}}, [("w/kernel", text)], jax.random.key(seed))


def moved(params, seed=1, size=1.0):
    mask, rng = masks.declared(params, 0), np.random.default_rng(seed)
    return jax.tree.map(lambda m, x: x + jnp.asarray(size * rng.standard_normal(x.shape), x.dtype) if m else x, mask, params)


def factors(kernel, task):
    """A and B of one task of one matrix in float64, restated."""
    a, b = np.asarray(kernel.a, np.float64), np.asarray(kernel.b, np.float64)
    if isinstance(kernel, mixture.Bank):
        return a[task], b[task]
    z = 1 / (1 + np.exp(-np.asarray(kernel.logits, np.float64)[task]))
    z = z / z.sum(-1, keepdims=True)
    parts = range(len(z))
    return (np.concatenate([sum(z[q, s] * a[q, s] for s in range(z.shape[1])) for q in parts]),
            np.concatenate([sum(z[q, s] * b[q, s] for s in range(z.shape[1])) for q in parts], -1))  # fmt: skip


@pytest.mark.parametrize("text", ROUTED)
def test_each_row_meets_the_matrix_of_its_task(text):
    w, x, ids = matrix(D_IN, D_OUT), matrix(6, 7, D_IN, seed=2), np.asarray([3, 0, 0, 4, 1, 3])
    params = moved(put(text, w))
    kernel = params["w"]["kernel"]
    got = mixture.route(params, ids)["w"]["kernel"].dot(jnp.asarray(x))
    for row, task in enumerate(ids):
        a, b = factors(kernel, task)
        full = w + float(kernel.scale) * (a @ b)
        merged = kernels.merge(mixture.route(params, int(task)))["w"]["kernel"]
        np.testing.assert_allclose(merged, full, rtol=0, atol=1e-5 * np.abs(full).max())
        expected = x[row] @ full
        np.testing.assert_allclose(got[row], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    pooled = mixture.route(params, ids)["w"]["kernel"].dot(jnp.asarray(x[:, 0]))
    np.testing.assert_allclose(pooled, got[:, 0], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("text", ROUTED)
def test_a_routed_stack_runs_in_a_model_and_trains_the_tasks_it_met(text):
    model = make_model("llama")
    batch, ids = inputs(make_batch(model)), jnp.asarray([1, 3, 1, 1])
    params = moved(kernels.adapt(make_params(model), [("layers/.*/kernel", text)], jax.random.key(0)), size=0.1)
    apply = jax.jit(lambda p, ids: model.apply(mixture.route(p, ids), batch))
    logits = apply(params, ids)
    for task in (1, 3):
        alone = jax.jit(model.apply)(kernels.merge(mixture.route(params, task)), batch)
        np.testing.assert_allclose(logits[ids == task], alone[ids == task], rtol=0, atol=1e-4 * np.abs(alone).max())
    assert np.abs(np.asarray(apply(params, jnp.zeros(4, jnp.int32)) - logits)).max() > 1e-2
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    slope = jax.jit(jax.grad(lambda t: jnp.square(model.apply(mixture.route(tree.join(t, frozen), ids), batch)).mean()))(trainable)
    name = "a" if text.startswith("bank") else "logits"
    for path, leaf in tree.flatten(slope).items():
        if path.endswith("/" + name):
            met = np.abs(np.asarray(leaf)).reshape(*leaf.shape[:2], -1).max((0, 2)) > 0
            assert met.tolist() == [False, True, False, True, False], path


def test_a_bank_of_trained_adapters_serves_a_mixed_batch_as_each_would():
    model = make_model("bert")
    base, batch = make_params(model), inputs(make_batch(model))
    rules = ["lora(rank=2, alpha=4)", "lora(rank=5, alpha=1)", "rslora(rank=3)"]
    tuned = [moved(kernels.adapt(base, [("layers/attn/./kernel", r)], jax.random.key(i)), i, 0.2) for i, r in enumerate(rules)]
    bank = mixture.collect(tuned)
    assert bank["layers"]["attn"]["q"]["kernel"].a.shape == (3, 3, 32, 5)
    ids = jnp.asarray([2, 0, 1, 2])
    logits = jax.jit(lambda p: model.apply(mixture.route(p, ids), batch))(bank)
    for row, i in enumerate(ids):
        alone = jax.jit(model.apply)(tuned[i], batch)[row]
        np.testing.assert_allclose(logits[row], alone, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="layers/attn/k/kernel is no low-rank kernel of shape .* in every tree"):
        mixture.collect([tuned[0], base])


def test_thousands_of_adapters_serve_one_batch():
    """A row's cost does not grow with the bank: the compiled FLOPs of 4 and of 4,000 adapters are the same."""
    ids = jnp.asarray([7, 3999, 7, 1234])

    def flops(adapters):
        w = jax.ShapeDtypeStruct((64, 64), jnp.float32)
        kernel = jax.eval_shape(lambda w: put(f"bank(adapters={adapters}, rank=4)", w), w)
        run = jax.jit(lambda p, x: mixture.route(p, jnp.minimum(ids, adapters - 1))["w"]["kernel"].dot(x))
        return run.lower(kernel, jax.ShapeDtypeStruct((4, 32, 64), jnp.float32)).compile().cost_analysis()["flops"]

    assert flops(4000) == pytest.approx(flops(4), rel=0.01)


@pytest.mark.parametrize("splits", [1, 4])
def test_skills_are_those_of_peft(splits):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft.tuners.poly.layer import Linear

    w, x, ids = matrix(D_IN, D_OUT), matrix(4, 6, D_IN, seed=2), np.asarray([2, 0, 1, 2])
    params = moved(put(f"mhr(tasks=3, skills=5, splits={splits}, rank=4)", w))
    kernel = params["w"]["kernel"]
    base = torch.nn.Linear(D_IN, D_OUT, bias=False)
    base.weight.data = torch.tensor(w.T.copy())
    config = peft.PolyConfig(r=4, n_tasks=3, n_skills=5, n_splits=splits)
    theirs = Linear(base, "default", config).eval()
    theirs.poly_lora_A["default"].data = torch.tensor(np.array(kernel.a))
    theirs.poly_lora_B["default"].data = torch.tensor(np.array(kernel.b))
    theirs.poly_router["default"].module_logits.data = torch.tensor(np.array(kernel.logits).reshape(3, -1))
    expected = theirs(torch.tensor(x), task_ids=torch.tensor(ids)).detach().numpy()
    got = mixture.route(params, ids)["w"]["kernel"].dot(jnp.asarray(x))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def from_runs(name, w, runs, **hp):
    """The kernel that a method makes around ``w`` of kernels of finished runs."""
    made = registry.get("kernel", name).traits["parents"].make(runs)
    return registry.call("kernel", name, jnp.asarray(w), jax.random.key(7), start=made, **hp)


def test_mhr_z_and_mu_around_trained_skills():
    """The skills of three tasks with new routings, and their mean as LoRA, in numpy."""
    w, x = matrix(LAYERS, D_IN, D_OUT), matrix(4, 5, D_IN, seed=2)
    run = moved(put("mhr(tasks=3, skills=5, rank=4)", w))["w"]["kernel"]
    params = moved({"w": {"kernel": from_runs("mhr_z", w, [run], tasks=2)}})
    trainable, _ = tree.split(params, masks.declared(params, 0))
    assert set(tree.flatten(trainable)) == {"w/kernel/logits"} and tree.count(trainable) == LAYERS * 2 * 4 * 5
    ids = np.asarray([1, 0, 1, 1])
    z = jax.tree.map(lambda leaf: leaf[2], mixture.route(params, ids)["w"]["kernel"])
    for row, task in enumerate(ids):
        a, b = factors(z.replace(a=run.a[2], b=run.b[2]), task)
        np.testing.assert_allclose(z.dot(jnp.asarray(x))[row], x[row] @ (w[2] + 0.25 * a @ b), rtol=2e-5, atol=2e-4)
    mean = from_runs("mhr_mu", w, [run])
    assert type(mean).__name__ == "LowRank" and mean.base.shape == w.shape
    a, b = (np.asarray(f, np.float64)[1].mean(1) for f in (run.a, run.b))
    change = 0.25 * np.concatenate(list(a)) @ np.concatenate(list(b), -1)
    np.testing.assert_allclose(mean.dense()[1], w[1] + change, rtol=2e-5, atol=2e-5)
    for name in ("mhr_z", "mhr_mu"):
        with pytest.raises(UserError, match="the skills of one run can be taken, not of 2"):
            from_runs(name, w, [run, run])


def test_experts_are_weighed_by_a_softmax_of_the_input():
    w, x = matrix(D_IN, D_OUT), matrix(2, 5, D_IN, seed=2)
    params = put("loramoe(experts=3, rank=4, alpha=2)", w)
    np.testing.assert_array_equal(params["w"]["kernel"].dot(jnp.asarray(x)), kernels.dot(jnp.asarray(w), jnp.asarray(x)))
    params = moved(params)
    k = params["w"]["kernel"]
    gate, a, b = (np.asarray(f, np.float64) for f in (k.gate, k.a, k.b))
    scores = np.exp(x @ gate)
    scores /= scores.sum(-1, keepdims=True)
    expected = x @ w.astype(np.float64) + 0.5 * sum(scores[..., e, None] * (x @ a[e] @ b[e]) for e in range(3))
    np.testing.assert_allclose(k.dot(jnp.asarray(x)), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(k.gates(jnp.asarray(x)), scores, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="w/kernel: experts weighed by the input stand for no one matrix"):
        kernels.merge(params)


def test_meteora_takes_the_top_adapters_of_each_token():
    """In torch as published: the k largest logits, their softmax, each adapter by itself; and the gate's loss."""
    torch = pytest.importorskip("torch")
    w, x = matrix(D_IN, D_OUT), matrix(2, 5, D_IN, seed=2)
    rules = ["lora(rank=2, alpha=4)", "lora(rank=5, alpha=1)", "rslora(rank=3)", "lora(rank=2)"]
    runs = [moved(put(rule, w), i, 0.3)["w"]["kernel"] for i, rule in enumerate(rules)]
    k = from_runs("meteora", w, runs, k=2, gate_loss=50.0)
    assert {p for p in tree.flatten(tree.split({"w": k}, masks.declared({"w": k}, 0))[0])} == {"w/gate"}
    rows, logits = torch.tensor(x).reshape(-1, D_IN).double(), torch.tensor(x).reshape(-1, D_IN) @ torch.tensor(np.array(k.gate))
    best, chosen = torch.topk(logits.double(), 2, dim=-1)
    shares, expected = torch.softmax(best, -1), rows @ torch.tensor(w).double()
    for e, run in enumerate(runs):
        token, place = torch.where(chosen == e)
        a, b = (torch.tensor(np.array(f)).double() for f in (run.a, run.b))
        expected.index_add_(0, token, float(run.scale) * (rows[token] @ a @ b) * shares[token, place, None])
    np.testing.assert_allclose(k.dot(jnp.asarray(x)).reshape(-1, D_OUT), expected, rtol=0, atol=2e-5)
    tasks, real = jnp.asarray([3, 1]), np.ones((2, 5), np.float32)
    real[1, 3:] = 0
    labels = torch.tensor(np.where(real > 0, np.asarray(tasks)[:, None], -100).reshape(-1).astype(np.int64))
    np.testing.assert_allclose(k.penalty(jnp.asarray(x), real, tasks), torch.nn.functional.cross_entropy(logits, labels), rtol=2e-5)
    assert float(k.weight) == 50 and from_runs("meteora", w, runs).weight is None
    for count, top, words in ((4, 5, "k 5 of 4 adapters cannot be taken; largest: 4"), (1, 1, "one adapter leaves meteora's gate nothing")):
        with pytest.raises(UserError, match=words):
            from_runs("meteora", w, runs[:count], k=top)


@pytest.mark.parametrize("text", ROUTED)
def test_routing_without_fitting_task_ids_is_said(text):
    params, x = put(text, matrix(D_IN, D_OUT)), jnp.asarray(matrix(4, D_IN))
    for run, words in (
        (lambda: mixture.route(params, None), "w/kernel holds 5 tasks and the batch has no task ids"),
        (lambda: mixture.route(params, [0, 5]), "w/kernel holds 5 tasks, numbered from 0; there is no task 5"),
        (lambda: params["w"]["kernel"].dot(x), "holds 5 tasks; say with route"),
        (lambda: kernels.merge(params), "w/kernel: .* holds 5 tasks; say with route"),
        (lambda: kernels.merge(mixture.route(params, [0, 1])), "w/kernel: .* is a matrix for each row"),
        (lambda: mixture.route(params, [0, 1])["w"]["kernel"].dot(x), "2 rows have a task, the batch has 4 rows"),
    ):
        with pytest.raises(UserError, match=words):
            run()
    plain = put("lora", matrix(D_IN, D_OUT))
    assert mixture.route(plain, None)["w"]["kernel"].shape == (D_IN, D_OUT)


@pytest.mark.parametrize("text, words", [
    ("bank(rank=17)", ["rank 17 does not fit a 24x16 matrix", "largest: 16"]),
    ("bank(adapters=0)", ["adapters 0 is below 1"]),
    ("polytropon(skills=0)", ["skills 0 is below 1"]),
    ("mhr(splits=5)", ["splits 5 do not divide both sides of a 24x16 matrix", "nearest: 4"]),
    ("mhr_z(tasks=1)", ["mhr_z starts from finished runs and names none; write mhr_z(runs=FOLDER)"]),
    ("meteora(start=3)", ["meteora: its start comes from finished runs and cannot be written in a config"]),
    ("loramoe(experts=0)", ["experts 0 is below 1"]),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_an_unfit_rule_is_one_line_that_names_the_leaf(text, words):
    with pytest.raises(UserError) as error:
        put(text, matrix(D_IN, D_OUT))
    assert all(w in str(error.value) for w in ["w/kernel", *words]), str(error.value)
    assert "\n" not in str(error.value)
