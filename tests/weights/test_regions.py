"""Regions: set algebra, where one sits, and what of a change lies in a subspace, against plain definitions."""

import numpy as np
import pytest

from ft_jax.errors import UserError
from ft_jax.weights import graft, regions
from tests import helpers

RNG = np.random.default_rng(0)
SHAPES = {"layers/attn/q/kernel": (2, 6, 8), "layers/attn/out/kernel": (2, 8, 6), "layers/mlp/up/bias": (2, 5)}


def mask(share=0.4, rng=RNG):
    return {p: rng.random(s) < share for p, s in SHAPES.items()}


def flat(m):
    return np.concatenate([x.ravel() for x in m.values()])


def test_union_and_complement_are_those_of_sets():
    a, b, c = mask(), mask(), mask()
    np.testing.assert_array_equal(flat(regions.union([a, b, c])), flat(a) | flat(b) | flat(c))
    np.testing.assert_array_equal(flat(regions.complement(a)), ~flat(a))
    assert not (flat(a) == flat(regions.union([a, b]))).all()
    with pytest.raises(UserError, match="differ at 'layers/mlp/up/bias'"):
        regions.union([a, {p: m for p, m in b.items() if "bias" not in p}])


def test_union_leaves_its_masks_as_they_were():
    a, b = mask(), mask()
    before = flat(a).copy()
    regions.union([a, b])
    np.testing.assert_array_equal(flat(a), before)


def test_overlap_matrix_and_what_chance_gives():
    many = [mask(s) for s in (0.1, 0.3, 0.6)]
    found = regions.overlap_matrix(many)
    for i, a in enumerate(many):
        for j, b in enumerate(many):
            assert found[i, j] == pytest.approx((flat(a) & flat(b)).sum() / flat(b).sum())
    assert np.diag(found) == pytest.approx(1.0)
    shapes = {"layers/a/kernel": (4, 50, 50)}
    random = [{p: RNG.random(s) < share for p, s in shapes.items()} for share in (0.1, 0.5)]
    np.testing.assert_allclose(regions.overlap_matrix(random)[0, 1], regions.chance_overlap(random)[0, 1], atol=0.02)
    assert regions.chance_overlap(random)[1, 0] == pytest.approx(0.5, abs=0.02)


def test_layer_and_kind_rows_count_everything_once():
    m = mask()
    rows = regions.by_layer_and_kind(m)
    assert sum(r["parameters"] for r in rows) == flat(m).sum() and sum(r["eligible"] for r in rows) == flat(m).size
    one = next(r for r in rows if (r["kind"], r["leaf"], r["layer"]) == ("attn/q", "kernel", 1))
    assert one["parameters"] == m["layers/attn/q/kernel"][1].sum() and one["eligible"] == 48
    loose = regions.by_layer_and_kind({"norm/scale": np.ones(3, bool)})
    assert loose == [{"kind": "norm", "leaf": "scale", "layer": None, "parameters": 3, "eligible": 3}]


def test_heads_are_columns_of_queries_and_rows_of_the_output():
    m = {p: np.zeros(s, bool) for p, s in SHAPES.items()}
    m["layers/attn/q/kernel"][1, :, 4:8] = True  # head 1 of two, head size 4
    m["layers/attn/out/kernel"][0, 0:4, :2] = True
    found = {(r["kind"], r["layer"], r["head"]): r["parameters"] for r in regions.by_head(m, 4) if r["parameters"]}
    assert found == {("attn/q", 1, 1): 24, ("attn/out", 0, 0): 8}
    assert {r["eligible"] for r in regions.by_head(m, 4)} == {24}
    with pytest.raises(UserError, match="not a multiple of the head size 3"):
        regions.by_head(m, 3)


def test_heads_of_grouped_queries():
    params = helpers.make_params(helpers.make_model("llama"))
    m = graft.random_mask(params, 0.5, np.random.default_rng(0))
    rows = regions.by_head(m, 8)
    heads = {kind: len({r["head"] for r in rows if r["kind"] == kind}) for kind in ("attn/q", "attn/k", "attn/v", "attn/out")}
    assert heads == {"attn/q": 4, "attn/k": 2, "attn/v": 2, "attn/out": 4}


def test_enrichment_is_one_for_even_regions_and_follows_the_density():
    rows = [{"layer": 0, "parameters": 10, "eligible": 100}, {"layer": 1, "parameters": 30, "eligible": 100}]
    assert regions.enrichment(rows, "layer") == {0: pytest.approx(0.5), 1: pytest.approx(1.5)}
    assert regions.enrichment([{**r, "parameters": 0} for r in rows], "layer") == {0: None, 1: None}


def test_top_entries_are_the_largest_over_all_leaves():
    change = {p: RNG.standard_normal(s) for p, s in SHAPES.items()}
    chosen, size = flat(regions.top_entries(change, 17)), np.abs(np.concatenate([c.ravel() for c in change.values()]))
    assert chosen.sum() == 17 and size[chosen].min() >= size[~chosen].max()
    assert flat(regions.top_entries(change, 0)).sum() == 0
    with pytest.raises(UserError, match="cannot take"):
        regions.top_entries(change, 10**6)


def orthonormal(rows, columns):
    return np.linalg.qr(RNG.standard_normal((rows, columns)))[0]


def test_energy_share_is_that_of_the_projection():
    change, v, u = RNG.standard_normal((7, 5)), orthonormal(7, 2), orthonormal(5, 3)
    for inner in (None, v):
        projected = (change if inner is None else inner @ inner.T @ change) @ u @ u.T
        np.testing.assert_allclose(regions.project(change, inner, u), projected, atol=1e-12)
        inside, whole = regions.energy_share(change, inner, u)
        assert inside == pytest.approx((projected**2).sum()) and whole == pytest.approx((change**2).sum())
        rest = change - projected
        assert inside + (rest**2).sum() == pytest.approx(whole)  # Pythagoras: an orthogonal projection
    assert regions.energy_share(v[:, :1] @ u[:, :1].T, v, u)[0] == pytest.approx(1.0)
    assert regions.energy_share(change, v, u[:, :0])[0] == 0.0 and not regions.project(change, v, u[:, :0]).any()


def test_restricted_change():
    m = mask()
    change = {p: RNG.standard_normal(s) for p, s in SHAPES.items()}
    found = regions.restricted(change, m)
    for p in SHAPES:
        np.testing.assert_array_equal(found[p][m[p]], change[p][m[p]])
        assert not found[p][~m[p]].any()
    with pytest.raises(UserError, match="no leaf 'layers/mlp/up/bias'"):
        regions.restricted({p: c for p, c in change.items() if "bias" not in p}, m)


def test_change_between_trees():
    model = helpers.make_model("bert")
    a, b = helpers.make_params(model, 0), helpers.make_params(model, 1)
    found = regions.change_of(a, b, ["layers/mlp/up/kernel"])
    assert list(found) == ["layers/mlp/up/kernel"]
    np.testing.assert_allclose(found["layers/mlp/up/kernel"], b["layers"]["mlp"]["up"]["kernel"] - a["layers"]["mlp"]["up"]["kernel"])
    assert set(regions.change_of(a, b)) > {"embed/norm/bias", "head/kernel"}
