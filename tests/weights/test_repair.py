"""Intruder repair: planted intruders, closed forms of the edit and of its controls, adapters that keep their rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import registry, tree
from ft_jax.analysis import spectral
from ft_jax.errors import UserError
from ft_jax.kernels import LowRank, adapt, merge
from ft_jax.weights import repair

LAYERS, D_IN, D_OUT, RANK = 3, 24, 36, 3
PATH = "layers/attn/q/kernel"
SIGMA = np.geomspace(4, 0.1, D_IN)


def orthonormal(rng, d, n):
    return np.linalg.qr(rng.standard_normal((d, n)))[0].T


def planted(sizes=((1, 5.0),), seed=0):
    """``(base, tuned, {layer: (u, v)})`` trees; layer i of the tuned one holds size · v uᵀ beyond the base's span.

    The base's vectors span all but the last directions of both sides, so the planted ones are singular vectors of the
    sum and orthogonal to every base vector.
    """
    rng = np.random.default_rng(seed)
    sides = [(orthonormal(rng, D_IN, D_IN), orthonormal(rng, D_OUT, D_OUT)) for _ in range(LAYERS)]
    base = np.array([(left[: D_IN - 4].T * SIGMA[: D_IN - 4]) @ right[: D_IN - 4] for left, right in sides])
    tuned, where = base.copy(), {}
    for i, (layer, size) in enumerate(sizes):
        v, u = (side[-1 - i] for side in sides[layer])
        tuned[layer] += size * np.outer(v, u)
        where.setdefault(layer, []).append((u, v))
    return as_tree(base), as_tree(tuned), where


def as_tree(kernel, seed=5):
    rest = np.random.default_rng(seed).standard_normal(4)
    return {"layers": {"attn": {"q": {"kernel": jnp.asarray(kernel, jnp.float32)}}}, "norm": {"scale": jnp.asarray(rest)}}


def at(params):
    return np.asarray(tree.flatten(params)[PATH])


def intruders(base, tuned, k=10):
    return np.asarray(spectral.intruder_dimensions(at(base), at(tuned), k=k)["intruders"])


def test_a_planted_intruder_is_found_with_its_rank_vectors_and_neighbour():
    base, tuned, where = planted(((1, 3.0),))
    found = repair.find(base, tuned)[PATH]
    above = int((SIGMA > 3.0).sum())
    assert found["rank"].tolist() == [-1, above, -1] and found["neighbour"].tolist() == [-1, above + 1, -1]
    assert found["sigma"][1, above] == pytest.approx(3.0, rel=1e-6)
    (u, v), = where[1]
    sign = np.sign(found["u"][1, above] @ u)
    np.testing.assert_allclose(sign * found["u"][1, above], u, atol=1e-5)
    np.testing.assert_allclose(sign * found["v"][1, above], v, atol=1e-5)
    assert found["delta_norm"] == pytest.approx([0, 3, 0], rel=1e-5)
    assert not found["u"][0].any() and not found["sigma"][2].any()


@pytest.mark.parametrize("sizes, neighbour", [
    (((0, 9.0),), 1),  # the first of all: the one below
    (((0, 9.0), (0, 8.0)), 2),  # the two first are intruders
    (((0, 3.2), (0, 3.1)), 1),  # below lies another intruder: the one above, as near
])
def test_the_neighbour_is_the_nearest_pretrained_direction(sizes, neighbour):
    base, tuned, _ = planted(sizes)
    assert repair.find(base, tuned)[PATH]["neighbour"][0] == neighbour


def test_a_matrix_of_intruders_alone_has_no_neighbour_and_its_control_changes_nothing():
    base, tuned, _ = planted(((0, 9.0), (0, 8.0)))
    found = repair.find(base, tuned, k=2)
    assert found[PATH]["neighbour"][0] == -1
    np.testing.assert_array_equal(at(repair.apply(tuned, found, 0.5, "neighbour")), at(tuned))
    assert repair.changes(found, 0.5, control="neighbour")[0]["neighbour"] is None


@pytest.mark.parametrize("which, left", [("top", 1), ("all", 0)])
def test_removal_takes_the_planted_direction_out_and_the_count_drops(which, left):
    base, tuned, where = planted(((1, 5.0), (1, 3.0)))
    assert intruders(base, tuned).tolist() == [0, 2, 0]
    found = repair.find(base, tuned)
    mended = repair.apply(tuned, found, 0.0, which=which)
    assert intruders(base, mended).tolist() == [0, left, 0]
    (u, _), (u2, v2) = where[1]
    rest = at(base) + (which == "top") * np.array([0, 3.0, 0])[:, None, None] * np.outer(v2, u2)
    np.testing.assert_allclose(at(mended), rest, atol=3e-6)
    assert np.linalg.norm(at(mended)[1] @ u) < 1e-5 < 4 < np.linalg.norm(at(tuned)[1] @ u)


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.7, 1.5])
def test_the_edit_scales_one_singular_value_and_nothing_else(factor):
    base, tuned, _ = planted(((1, 3.0),))
    found = repair.find(base, tuned)
    mended = at(repair.apply(tuned, found, factor))
    before, after = (np.linalg.svd(m[1].astype(np.float64), compute_uv=False) for m in (at(tuned), mended))
    expected = np.where(np.isclose(before, 3.0), factor * before, before)
    np.testing.assert_allclose(after, np.sort(expected)[::-1], atol=1e-5)
    for layer in (0, 2):
        np.testing.assert_array_equal(mended[layer], at(tuned)[layer])
    assert repair.changes(found, factor)[0]["change"] == pytest.approx(np.linalg.norm(mended - at(tuned)), rel=1e-5)


@pytest.mark.parametrize("control", repair.CONTROLS)
@pytest.mark.parametrize("kernel", [False, True])
def test_factor_one_changes_no_bit(control, kernel):
    base, tuned, _ = adapter(seed=3) if kernel else planted()
    out = repair.apply(tuned, repair.find(base, tuned), 1.0, control)
    jax.tree.map(np.testing.assert_array_equal, out, tuned)
    assert np.signbit(np.asarray(jax.tree.leaves(out)[0])).tolist() == np.signbit(np.asarray(jax.tree.leaves(tuned)[0])).tolist()


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("which", repair.WHICH)
def test_shrink_changes_by_the_norm_of_the_repair(factor, which):
    base, tuned, _ = planted(((1, 5.0), (1, 3.0)))
    found = repair.find(base, tuned)
    by_repair, by_shrink = (at(repair.apply(tuned, found, factor, c, which)) - at(tuned) for c in ("none", "shrink"))
    np.testing.assert_allclose(*(np.linalg.norm(x, axis=(1, 2)) for x in (by_repair, by_shrink)), rtol=1e-5, atol=1e-7)
    delta = at(tuned) - at(base)
    share = (by_shrink * delta).sum((1, 2))[1] / (np.linalg.norm(by_shrink[1]) * np.linalg.norm(delta[1]))
    assert abs(share) == pytest.approx(1, rel=1e-5)  # along ΔW
    row, = repair.changes(found, factor, control="shrink", which=which)
    assert row["change"] == pytest.approx(np.linalg.norm(by_shrink), rel=1e-5) and row["index"] == [1]


def test_shrink_ends_at_the_base():
    """An intruder that W0 had already, under a small ΔW: the shrink cannot be as large, and says so."""
    rng = np.random.default_rng(0)
    left, right = orthonormal(rng, 8, 2), orthonormal(rng, 8, 8)
    base = 3 * np.outer(left[0], right[0]) + 2.9 * np.outer(left[1], right[1])
    tuned = base + np.outer(left[0], 0.3 * right[1]) + np.outer(left[1], 0.3 * right[0])  # turns the pair by 45°
    base, tuned = (as_tree(x[None]) for x in (base, tuned))
    found = repair.find(base, tuned, k=1, eps=0.9)
    assert found[PATH]["rank"].tolist() == [0]
    row, = repair.changes(found, 0.0, control="shrink")
    assert row["shrink"] == 0 and row["change"] == pytest.approx(row["delta_norm"]) and row["change"] < 0.2 * row["sigma"]
    np.testing.assert_allclose(at(repair.apply(tuned, found, 0.0, "shrink")), at(base), atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_neighbour_scales_the_direction_beside_by_the_same_factor(factor):
    base, tuned, _ = planted(((1, 3.0),))
    found = repair.find(base, tuned)
    mended = at(repair.apply(tuned, found, factor, "neighbour"))
    beside = max(s for s in SIGMA if s < 3.0)
    before, after = (np.linalg.svd(m[1].astype(np.float64), compute_uv=False) for m in (at(tuned), mended))
    np.testing.assert_allclose(after, np.sort(np.where(np.isclose(before, beside), factor * before, before))[::-1], atol=1e-5)
    assert np.linalg.norm(mended - at(tuned)) == pytest.approx((1 - factor) * beside, rel=1e-5)
    assert intruders(base, as_tree(mended)).tolist() == [0, 1, 0]  # the intruder is still there


def adapter(seed=0, size=6.0, base_seed=0):
    """``(base, tuned with a LoRA kernel, its (a, b))``; in layer 1 the first column of A B is an intruder."""
    rng = np.random.default_rng(seed)
    base, _, _ = planted(seed=base_seed)
    params = adapt(base, [(PATH, f"lora(rank={RANK}, alpha={2 * RANK})")], jax.random.key(seed))
    leaf = params["layers"]["attn"]["q"]["kernel"]
    a, b = 0.05 * rng.standard_normal(leaf.a.shape), 0.05 * rng.standard_normal(leaf.b.shape)
    a[1, :, 0] = rng.standard_normal(D_IN) / np.sqrt(D_IN)
    b[1, 0] = size * rng.standard_normal(D_OUT) / np.sqrt(D_OUT)
    params["layers"]["attn"]["q"]["kernel"] = leaf.replace(a=jnp.asarray(a, jnp.float32), b=jnp.asarray(b, jnp.float32))
    return base, params, (a, b)


def test_an_adapter_keeps_its_rank_and_loses_what_eckart_young_says():
    base, tuned, _ = adapter()
    found = repair.find(base, tuned)
    assert (found[PATH]["rank"] >= 0).tolist() == [False, True, False]
    mended, lost = repair.mend(tuned, found, 0.3)
    leaf, old = (p["layers"]["attn"]["q"]["kernel"] for p in (mended, tuned))
    assert isinstance(leaf, LowRank) and leaf.a.shape == old.a.shape and leaf.b.shape == old.b.shape
    wanted = at(repair.apply(merge(tuned), found, 0.3)) - at(base)
    for layer in (0, 2):
        np.testing.assert_array_equal(leaf.a[layer], old.a[layer])
        assert lost[PATH][layer] == 0
    u, s, vt = np.linalg.svd(wanted[1].astype(np.float64))
    np.testing.assert_allclose(at(merge(mended))[1] - at(base)[1], (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=1e-5)
    assert lost[PATH][1] == pytest.approx(np.linalg.norm(s[RANK:]) / np.linalg.norm(s), rel=1e-3) and lost[PATH][1] > 1e-3


def test_a_mend_in_the_span_of_the_adapter_is_exact():
    """ΔW on directions the base lacks: the intruder is one of the adapter's own, and nothing is lost."""
    base, dense, where = planted(((1, 5.0), (1, 3.0)))
    (u1, v1), (u2, v2) = where[1]
    a, b = np.zeros((LAYERS, D_IN, 3), np.float32), np.zeros((LAYERS, 3, D_OUT), np.float32)
    a[1, :, :2], b[1, :2] = np.stack([v1, v2], 1), np.stack([2.5 * u1, 1.5 * u2])  # the third is padding
    leaf = LowRank(tree.flatten(base)[PATH], jnp.asarray(a), jnp.asarray(b), jnp.full(LAYERS, 2.0))
    tuned = {**base, "layers": {"attn": {"q": {"kernel": leaf}}}}
    np.testing.assert_allclose(at(merge(tuned)), at(dense), atol=1e-6)
    for options in ({"which": "top"}, {"which": "all"}, {"control": "shrink"}):
        found = repair.find(base, tuned)
        mended, lost = repair.mend(tuned, found, 0.4, **options)
        np.testing.assert_allclose(at(merge(mended)), at(repair.apply(dense, repair.find(base, dense), 0.4, **options)), atol=2e-6)
        assert lost[PATH].max() < 1e-6
        kernel = mended["layers"]["attn"]["q"]["kernel"]
        assert not kernel.a[:, :, 2].any() and not kernel.b[:, 2].any()


@pytest.mark.parametrize("shape", [(5, 40, 5), (40, 5, 5), (6, 7, 9)])
def test_projection_of_narrow_matrices_and_of_ranks_beyond_them(shape):
    d_in, d_out, rank = shape
    rng = np.random.default_rng(0)
    a, b, left, right = (rng.standard_normal(s) for s in ((d_in, rank), (rank, d_out), (2, d_in), (2, d_out)))
    new_a, new_b, lost = repair.project(a, b, -1.5, left, right)
    assert new_a.shape == a.shape and new_b.shape == b.shape
    wanted = -1.5 * a @ b + left.T @ right
    s = np.linalg.svd(wanted, compute_uv=False)
    assert lost == pytest.approx(np.linalg.norm(s[rank:]) / np.linalg.norm(s), abs=1e-6)
    assert np.linalg.norm(-1.5 * new_a @ new_b - wanted) == pytest.approx(np.linalg.norm(s[rank:]), abs=1e-4)


def test_the_registered_edit_is_find_and_apply():
    base, tuned, _ = planted(((1, 3.0),))
    out = registry.call("edit", "scale_intruders", base, tuned, factor=0.25)
    jax.tree.map(np.testing.assert_array_equal, out, repair.apply(tuned, repair.find(base, tuned), 0.25))
    np.testing.assert_array_equal(out["norm"]["scale"], tuned["norm"]["scale"])
    assert registry.get("edit", "scale_intruders").hyperparameters["factor"] == 0.7


def test_known_cosines_spare_the_base_and_give_the_same():
    base, tuned, _ = planted(((1, 3.0),))
    cosine = spectral.intruder_dimensions(at(base), at(tuned))["max_cosine"]
    first, second = repair.of_matrices(at(base), at(tuned)), repair.of_matrices(at(base), at(tuned), cosine=cosine)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    one = repair.of_matrices(at(base)[1], at(tuned)[1])  # a single matrix has no leading axis
    assert one["rank"] == first["rank"][1] and one["u"].shape == (10, D_OUT)
    np.testing.assert_array_equal(one["v"], first["v"][1])
    row, = repair.changes({"w": one}, 0.5)
    assert row["index"] == [] and row["change"] == pytest.approx(1.5)
    np.testing.assert_array_equal(
        repair.apply({"w": at(tuned)[1]}, {"w": one}, 0.5)["w"], at(repair.apply(tuned, repair.find(base, tuned), 0.5))[1])


@pytest.mark.parametrize("options, message", [
    ({"factor": -0.1}, "factor -0.1 cannot scale"),
    ({"factor": float("nan")}, "factor nan cannot scale"),
    ({"control": "neighbor"}, "control 'neighbor' is not known; nearest: 'neighbour'"),
    ({"which": "topp"}, "which 'topp' is not known; nearest: 'top'"),
    ({"which": "all", "control": "neighbour"}, "belongs to which 'top'"),
    ({"include": "layer/.*"}, "include 'layer/.*' matches no leaf"),
    ({"k": 0}, "at least one direction"),
    ({"eps": 1.5}, "a cosine threshold in"),
])
def test_options_that_make_no_sense_are_named(options, message):
    base, tuned, _ = planted()
    with pytest.raises(UserError, match=message):
        repair.scale_intruders(base, tuned, **options)


def test_trees_that_do_not_fit_are_named():
    base, tuned, _ = planted()
    found = repair.find(base, tuned)
    with pytest.raises(UserError, match="found in another tree"):
        repair.apply({"layers": {"attn": {"k": tuned["layers"]["attn"]["q"]}}}, found)
    with pytest.raises(UserError, match=f"{PATH}: two matrices of one shape"):
        repair.find(base, as_tree(at(tuned)[:, :5]))
    with pytest.raises(UserError, match=f"{PATH}: .*NaN"):
        repair.find(base, as_tree(at(tuned) * np.nan))
    with pytest.raises(UserError, match=f"no leaf '{PATH}'"):
        repair.find(base, {"norm": tuned["norm"]})
    base, tuned, _ = adapter()
    leaf = tuned["layers"]["attn"]["q"]["kernel"]
    tuned["layers"]["attn"]["q"]["kernel"] = leaf.replace(base=leaf.base + 0.01)
    with pytest.raises(UserError, match="is not the base's"):
        repair.apply(tuned, repair.find(base, tuned), 0.5, "shrink")
