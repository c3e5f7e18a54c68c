"""Subspace kernels against explicit matrices, singular value decompositions and PEFT's rank allocator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ft_jax import kernels, masks, tree
from ft_jax.errors import UserError
from ft_jax.kernels import subspace

COUNTS = {
    **dict.fromkeys(("did", "said"), lambda d_in, d_out, dimension: dimension),
    "sst": lambda d_in, d_out, rank: min(d_in, d_out) + rank * (d_in + d_out),
    "pela": lambda d_in, d_out, share, **_: round(share * d_in * d_out / (d_in + d_out)) * (d_in + d_out),
    "ssf": lambda d_in, d_out, **_: d_out,
    "adalora": lambda d_in, d_out, rank, **_: rank * (d_in + d_out + 1),
}
D_IN, D_OUT, LAYERS = 24, 16, 3


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def put(text, w, seed=0):
    return kernels.adapt({"w": {"kernel": jnp.asarray(w)}}, [("w/kernel", text)], jax.random.key(seed))["w"]["kernel"]


def moved(kernel, seed=1, size=1.0):
    mask, rng = masks.declared(kernel, 0), np.random.default_rng(seed)
    return jax.tree.map(lambda m, x: x + jnp.asarray(size * rng.standard_normal(x.shape), x.dtype) if m else x, mask, kernel)


@pytest.mark.parametrize("n", [1, 2, 64])
def test_the_hadamard_transform_is_the_matrix_over_the_root_of_its_size(n):
    x = matrix(3, n)
    np.testing.assert_allclose(subspace.hadamard(jnp.asarray(x)), x @ scipy.linalg.hadamard(n) / n**0.5, rtol=0, atol=1e-5)
    np.testing.assert_allclose(subspace.hadamard(subspace.hadamard(jnp.asarray(x))), x, rtol=0, atol=1e-6)


def fastfood(kernel):
    """P ``[d_in · d_out, d]`` of one matrix as the reference code has it: unnormalised H, over √(D Σ G²)."""
    d_in, d_out = kernel.shape
    order, gains, signs = (np.asarray(x, np.float64) for x in (kernel.order, kernel.gains, kernel.signs))
    n, d = len(order), len(signs)
    h = scipy.linalg.hadamard(n).astype(np.float64)
    padded = np.eye(n, d) * signs
    mixed = gains[:, None] * (h @ padded)[order.astype(int)]
    return (h @ mixed)[: d_in * d_out] / np.sqrt(d_in * d_out * np.square(gains).sum())


@pytest.mark.parametrize("name", ["did", "said"])
def test_the_change_is_a_fastfood_transform_of_few_numbers(name):
    w = matrix(LAYERS, D_IN, D_OUT)
    start = put(f"{name}(dimension=20)", w)
    np.testing.assert_array_equal(start.dense(), w)
    assert start.order.shape == (LAYERS, 512) and {len(set(r)) for r in np.asarray(start.order).tolist()} == {512}
    assert set(np.unique(start.signs)) == {-1, 1}
    np.testing.assert_allclose(np.square(start.gains).sum(-1), 512, rtol=1e-5)
    kernel = moved(start)
    for i in range(LAYERS):
        layer = jax.tree.map(lambda x, i=i: x[i], kernel)
        p = fastfood(layer)
        factor = float(layer.size) if name == "said" else 1.0
        change = factor * (p @ np.asarray(layer.z, np.float64)).reshape(D_IN, D_OUT)
        np.testing.assert_allclose(layer.dense(), w[i] + change, rtol=0, atol=2e-6)
        assert np.linalg.norm(p, axis=0) == pytest.approx(1, abs=0.2), "a step in z is a step as long in W"


@pytest.mark.slow
def test_the_slope_of_the_coordinates_is_the_projected_slope_of_the_matrix():
    w, x, g = matrix(D_IN, D_OUT), matrix(5, D_IN, seed=1), matrix(5, D_OUT, seed=2)
    kernel = moved(put("said(dimension=20)", w))
    slope = jax.grad(lambda z, s: (kernel.replace(z=z, size=s).dot(x) * g).sum(), (0, 1))(kernel.z, kernel.size)
    p, dense = fastfood(kernel), (x.astype(np.float64).T @ g).reshape(-1)
    np.testing.assert_allclose(slope[0], float(kernel.size) * (p.T @ dense), rtol=0, atol=2e-5)
    assert float(slope[1]) == pytest.approx(float(np.asarray(kernel.z, np.float64) @ (p.T @ dense)), rel=1e-4)


def test_sst_takes_the_spectrum_apart_and_moves_what_it_picked():
    w = matrix(LAYERS, D_IN, D_OUT)
    start = put("sst(rank=5)", w)
    np.testing.assert_allclose(start.sizes, np.linalg.svd(w, compute_uv=False), rtol=1e-5)
    np.testing.assert_allclose(start.dense(), w, rtol=0, atol=5e-6)
    assert all(len(set(row)) == 5 for row in np.asarray(start.picked).tolist())
    kernel = moved(start)
    for i in range(LAYERS):
        layer = jax.tree.map(lambda x, i=i: np.asarray(x[i]), kernel)
        left, right = layer.a.astype(np.float64), layer.b.astype(np.float64)
        left[:, layer.picked] += layer.du
        right[layer.picked] += layer.dv
        np.testing.assert_allclose(kernel.dense()[i], left * layer.sizes @ right, rtol=0, atol=5e-5)


def test_sst_slopes_of_vectors_lack_the_singular_value():
    x, g = matrix(5, D_IN, seed=1), matrix(5, D_OUT, seed=2)
    kernel = put("sst(rank=5)", matrix(D_IN, D_OUT))
    trainable, frozen = tree.split(kernel, masks.declared(kernel, 0))
    slope = jax.grad(lambda t: (tree.join(t, frozen).dot(x) * g).sum())(trainable)
    dense, u, v = x.astype(np.float64).T @ g, np.asarray(kernel.a, np.float64), np.asarray(kernel.b, np.float64)
    np.testing.assert_allclose(slope.sizes, np.diag(u.T @ dense @ v.T), rtol=0, atol=2e-5)
    np.testing.assert_allclose(slope.du, (dense @ v.T)[:, kernel.picked], rtol=0, atol=2e-5)
    np.testing.assert_allclose(slope.dv, (u.T @ dense)[kernel.picked], rtol=0, atol=2e-5)


def test_sst_draws_vectors_in_proportion_to_their_singular_values():
    sizes = np.asarray([8.0, 4.0, 2.0, 1.0, 0.0])
    kernel = put("sst(rank=1)", np.tile(np.diag(sizes).astype(np.float32), (4000, 1, 1)))
    drawn = np.bincount(np.asarray(kernel.picked)[:, 0], minlength=5) / 4000
    np.testing.assert_allclose(drawn, sizes / 15, rtol=0, atol=0.03)


@pytest.mark.parametrize("share, rank", [(0.5, 5), (0.1, 1), (1.0, 10)])
def test_pela_keeps_the_best_part_of_its_size(share, rank):
    w = matrix(LAYERS, D_IN, D_OUT)
    kernel = put(f"pela(share={share})", w)
    tails = np.linalg.svd(w, compute_uv=False)[:, rank:]
    errors = np.linalg.norm(np.asarray(kernel.dense()) - w, axis=(1, 2))
    np.testing.assert_allclose(errors, np.sqrt(np.square(tails).sum(-1)), rtol=1e-4)
    both, one = (tree.split(k, masks.declared(k, 0))[0] for k in (kernel, put(f"pela(share={share}, train=b)", w)))
    assert set(tree.flatten(both)) == {"a", "b"} and set(tree.flatten(one)) == {"b"}


def test_ssf_scales_each_output_by_a_draw_around_one():
    w = matrix(LAYERS, D_IN, 512)
    np.testing.assert_array_equal(put("ssf(spread=0.0)", w).dense(), w)
    kernel = put("ssf", w)
    assert (float(kernel.s.mean()), float(kernel.s.std())) == pytest.approx((1, 0.02), abs=2e-3)
    np.testing.assert_allclose(kernel.dense(), w * np.asarray(kernel.s)[:, None], rtol=1e-6)


def triplets(seed=0, rank=4):
    """Two sites, one of them a stack, away from their start; gradients of three steps."""
    params = {n: {"kernel": moved(put(f"adalora(rank={rank})", matrix(*s, seed=seed)))} for n, s in SITES.items()}
    trainable, _ = tree.split(params, masks.declared(params, 0))
    rng = np.random.default_rng(seed)
    return params, [jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), trainable) for _ in range(3)]


SITES = {"x": (2, 24, 16), "y": (12, 20)}


def test_adalora_is_a_product_around_a_diagonal():
    w = matrix(LAYERS, D_IN, D_OUT)
    start = put("adalora(rank=4, alpha=8)", w)
    np.testing.assert_array_equal(start.dense(), w)
    assert float(start.a.std()) == pytest.approx(0.02, rel=0.15) and not np.asarray(start.e).any()
    k = moved(start)
    a, e, b = (np.asarray(x, np.float64) for x in (k.a, k.e, k.b))
    np.testing.assert_allclose(k.dense(), w + 2 * (a * e[:, None]) @ b, rtol=0, atol=2e-5)
    expected = [np.mean([np.linalg.norm(m - np.eye(4)) for m in (a[i].T @ a[i], b[i] @ b[i].T)]) for i in range(LAYERS)]
    np.testing.assert_allclose(k.penalty(), expected, rtol=1e-5)
    assert float(k.weight[0]) == 0.5 and put("adalora(rank=4, orthogonality=0)", w).weight is None
    with pytest.raises(UserError, match="the weight -1 of a loss term is negative"):
        put("adalora(rank=4, orthogonality=-1)", w)


@pytest.mark.parametrize("budget", [1, 5, 11, 12])
def test_the_allocation_keeps_the_best_triplets_of_all_matrices(budget):
    params, steps = triplets()
    state = None
    for grads in steps:
        state = subspace.importance(params, grads, state)
    after = jax.jit(subspace.allocate)(params, state, budget)
    scores = subspace.triplet_scores(state)
    flat = np.sort(np.concatenate([np.asarray(s).reshape(-1) for s in scores.values()]))
    for n in SITES:
        before, kept = params[n]["kernel"], after[n]["kernel"]
        expected = np.where(np.asarray(scores[f"{n}/kernel"]) >= flat[-budget], before.e, 0)
        np.testing.assert_array_equal(kept.e, expected)
        np.testing.assert_array_equal(kept.a, before.a)
    assert sum(np.count_nonzero(after[n]["kernel"].e) for n in SITES) == budget


def test_forward_importance_budget_and_allocation_are_those_of_peft():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator, SVDLinear

    params, steps = triplets()
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=10, tfinal=20, deltaT=5, total_step=100, lora_alpha=16)
    flat = {f"{n}{i}": jax.tree.map(lambda x, i=i: x[i] if i != "" else x, params[n]["kernel"])
            for n, i in (("x", 0), ("x", 1), ("y", ""))}  # fmt: skip
    model = torch.nn.ModuleDict()
    for name, k in flat.items():
        base = torch.nn.Linear(*k.shape, bias=False)
        base.weight.data = torch.tensor(np.asarray(k.base).T.copy())
        model[name] = SVDLinear(base, "default", config, r=4, lora_alpha=16)
        for part, value in (("A", k.a.T), ("B", k.b.T), ("E", k.e[:, None])):
            getattr(model[name], f"lora_{part}")["default"].data = torch.tensor(np.array(value))
        x = matrix(5, k.shape[0], seed=3)
        theirs = model[name](torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(k.dot(jnp.asarray(x)), theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    allocator = RankAllocator(model, config, "default")
    state = None
    for grads in steps:
        for name, module in model.items():
            g = grads[name[0]]["kernel"]
            g = jax.tree.map(lambda v, i=name[1:]: v[int(i)] if i else v, g)
            for part, value in (("A", g.a.T), ("B", g.b.T), ("E", g.e[:, None])):
                getattr(module, f"lora_{part}")["default"].grad = torch.tensor(np.array(value))
        allocator.update_ipt(model)
        state = subspace.importance(params, grads, state)
    plan = {"start": 12, "target": 6, "warmup": 10, "final": 20, "total": 100}
    assert [subspace.budget_at(s, **plan) for s in range(101)] == [allocator.budget_schedule(s)[0] for s in range(101)]
    allocator.mask_to_budget(model, 5)
    ours = subspace.allocate(params, state, 5)
    for name, module in model.items():
        e = ours[name[0]]["kernel"].e
        np.testing.assert_array_equal(e[int(name[1])] if name[1:] else e, module.lora_E["default"].detach().numpy()[:, 0])


@pytest.mark.parametrize("text, words", [
    ("did(dimension=0)", ["dimension 0 does not fit a 24x16 matrix; it is 1 to 384"]),
    ("said(dimension=385)", ["dimension 385 does not fit", "2 to 384"]),
    ("sst(rank=17)", ["rank 17 does not fit a 24x16 matrix", "largest: 16"]),
    ("sst @ lora", ["sst takes a plain matrix apart", "LowRank"]),
    ("pela(share=0.0)", ["share 0.0 of the weights", "nearest: 0.01"]),
    ("pela(train=a)", ["train 'a'", "known: b, both"]),
    ("ssf(spread=-0.1)", ["spread -0.1 is negative"]),
    ("adalora(rank=0)", ["rank 0 does not fit"]),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_an_unfit_rule_is_one_line_that_names_the_leaf(text, words):
    with pytest.raises(UserError) as error:
        put(text, matrix(D_IN, D_OUT))
    assert all(w in str(error.value) for w in ["w/kernel", *words]), str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no step is left between a warmup of 80 and the last 20 of 100"):
        subspace.budget_at(0, start=4, target=2, warmup=80, final=20, total=100)


def test_contributions_are_exact_for_a_quadratic_loss():
    """∫ ∂L/∂θ dt ⊙ Δ of a quadratic is Δ times the mean slope of both ends; unsigned sums over all are L's change."""
    targets = {"x": matrix(2, 4, 3, seed=1), "y": matrix(5, 2, seed=2)}
    base, tuned = ({n: {"kernel": jnp.asarray(matrix(*t.shape, seed=s + i))} for i, (n, t) in enumerate(targets.items())} for s in (5, 9))

    def loss(p):
        return sum(jnp.square(p[n]["kernel"] - t).sum() for n, t in targets.items())

    got = subspace.contributions(loss, base, tuned, steps=4)
    for n, t in targets.items():
        start, end = (np.asarray(p[n]["kernel"], np.float64) for p in (base, tuned))
        np.testing.assert_allclose(got[f"{n}/kernel"], np.abs((end - start) * (start + end - 2 * t)).sum((-2, -1)), rtol=1e-4)


def test_ranks_follow_the_scores_and_cut_columns_stay_zero():
    scores = {"x/kernel": jnp.asarray([6.0, 1.0]), "y/kernel": jnp.asarray(3.0)}
    ranks = subspace.apportion(scores, 12, most=8)
    assert {p: r.tolist() for p, r in ranks.items()} == {"x/kernel": [8, 1], "y/kernel": 3}
    assert {p: r.tolist() for p, r in subspace.apportion(scores, 12, most=5).items()} == {"x/kernel": [5, 2], "y/kernel": 5}
    params = {n: {"kernel": put("lora(rank=8)", matrix(*s))} for n, s in SITES.items()}
    cut = subspace.with_ranks(params, ranks)
    trainable, frozen = tree.split(cut, masks.declared(cut, 0))

    def loss(t):
        p = tree.join(t, frozen)
        return sum(jnp.square(kernels.dense(p[n]["kernel"]) - 1).sum() for n in SITES)

    for _ in range(3):
        trainable = jax.tree.map(lambda w, g: w - 1e-3 * g, trainable, jax.grad(loss)(trainable))
    for n in SITES:
        change = np.asarray(tree.join(trainable, frozen)[n]["kernel"].dense() - matrix(*SITES[n]))
        assert np.linalg.matrix_rank(change, 1e-5).tolist() == ranks[f"{n}/kernel"].tolist()
    with pytest.raises(UserError, match="a budget of 2 ranks is not 1 to 2 for each of 3 matrices"):
        subspace.apportion(scores, 2)
    with pytest.raises(UserError, match="x/kernel is no low-rank kernel of rank 9 or more"):
        subspace.with_ranks(params, {"x/kernel": np.asarray([9, 1])})
    with pytest.raises(UserError, match="z/kernel is no leaf of this tree"):
        subspace.with_ranks(params, {"z/kernel": np.asarray(1)})
