"""LoHa, LoKr, VeRA, RandLoRA, SHiRA, DeLoRA and HiRA against their closed forms."""

import jax
import numpy as np
import pytest

from ft_jax.errors import UserError
from ft_jax.kernels.products import factorisation
from tests.kernels.trees import D_IN, D_OUT, LAYERS, adapted, matrix, moved


def _lokr(d_in, d_out, rank, alpha, factor, both):
    (m, n), (l, k) = factorisation(d_in, factor), factorisation(d_out, factor)  # noqa: E741
    small = rank * (m + l) if both and rank < max(m, l) / 2 else m * l
    return small + (rank * (n + k) if rank < max(n, k) / 2 else n * k)


def _randlora(d_in, d_out, rank, alpha, seed):
    small = min(d_in, d_out)
    return -(-small // rank) * (rank + small)


COUNTS = {
    "loha": lambda d_in, d_out, rank, alpha: 2 * rank * (d_in + d_out),
    "lokr": _lokr,
    "vera": lambda d_in, d_out, rank, inner, seed: rank + d_out,
    "randlora": _randlora,
    "delora": lambda d_in, d_out, rank, bound: rank * (d_in + d_out) + 1,
    "hira": lambda d_in, d_out, rank: rank * (d_in + d_out),
}


def held(name, stack=(LAYERS,)):
    """The kernel away from its start, its matrix, and its arrays as float64."""
    kernel = moved(adapted(name, shape=(*stack, D_IN, D_OUT)))["w"]["kernel"]
    fields = {f: jax.tree.map(lambda x: np.asarray(x, np.float64), v) for f, v in vars(kernel).items()}
    return kernel, np.asarray(matrix(*stack, D_IN, D_OUT), np.float64), fields


def close(kernel, want):
    np.testing.assert_allclose(kernel.dense(), want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("rank, tokens", [(2, 500), (8, 500), (8, 3)])
def test_loha_is_the_product_of_two_products(rank, tokens):
    """Entry by entry; in either order of the multiplication, for r² may be more than the matrix has."""
    kernel, w, f = held(f"loha(rank={rank}, alpha=6)")
    want = w + 6 / rank * (f["a1"] @ f["b1"]) * (f["a2"] @ f["b2"])
    close(kernel, want)
    one, x = jax.tree.map(lambda v: v[0], kernel), matrix(tokens, D_IN, seed=3)
    np.testing.assert_allclose(one.dot(x), np.asarray(x) @ want[0], rtol=0, atol=1e-5 * np.abs(want[0]).max() * D_IN**0.5)
    change = np.linalg.matrix_rank((want - w)[0], tol=1e-9)
    assert change == min(rank**2, D_OUT), "more than LoRA of twice the rank has"


@pytest.mark.parametrize("rule, shapes", [
    ("lokr(rank=1, alpha=2)", [1, 2]), ("lokr(rank=8, alpha=8)", [1, 1]),
    ("lokr(rank=1, alpha=2, both=True)", [2, 2]), ("lokr(rank=2, alpha=2, factor=2)", [1, 2]),
])  # fmt: skip
def test_lokr_is_a_kronecker_product(rule, shapes):
    kernel, w, f = held(rule)
    assert [len(f["left"]), len(f["right"])] == shapes
    c, d = (x[0] if len(x) == 1 else x[0] @ x[1] for x in (f["left"], f["right"]))
    want = w + np.stack([s * np.kron(m, n) for s, m, n in zip(f["scale"], c, d, strict=True)])
    close(kernel, want)


@pytest.mark.parametrize("size, factor, want", [
    (256, -1, (16, 16)), (128, -1, (8, 16)), (127, -1, (1, 127)), (128, 4, (4, 32)), (24, 5, (4, 6)), (768, -1, (24, 32)), (1, -1, (1, 1)),
])  # fmt: skip
def test_factorisation(size, factor, want):
    assert factorisation(size, factor) == want


def test_vera_scales_one_frozen_pair():
    """W + A diag(d) B diag(o); A and B are the same numbers in every matrix and layer, whatever the run's seed."""
    kernel, w, f = held("vera(rank=6)")
    want = w + (f["a"] * f["inner"][:, None]) @ f["b"] * f["outer"][:, None]
    close(kernel, want)
    other = adapted("vera(rank=6)", shape=(8, 40), seed=5)["w"]["kernel"]
    np.testing.assert_allclose(other.a / 6**0.5 * 8**0.5, f["a"][1, :8] / 6**0.5 * D_IN**0.5, rtol=1e-5)
    np.testing.assert_allclose(other.b[:, :D_OUT], f["b"][2], rtol=1e-6)
    assert not np.allclose(adapted("vera(rank=6, seed=1)")["w"]["kernel"].a, f["a"][0])
    assert 0.9 * (6 / D_IN) ** 0.5 < np.abs(f["a"]).max() <= (6 / D_IN) ** 0.5 + 1e-6


@pytest.mark.parametrize("shape", [(D_IN, D_OUT), (D_OUT, D_IN), (D_OUT, D_OUT)])
def test_randlora_sums_full_rank_bases(shape):
    """Σ over pairs of one column of b, one weight, one row of a times one row of γ; the small side keeps a."""
    kernel = moved(adapted("randlora(rank=4, alpha=8)", shape=shape))["w"]["kernel"]
    a, b, weights, columns = (np.asarray(x, np.float64) for x in (kernel.a, kernel.b, kernel.weights, kernel.columns))
    rank, count = weights.shape
    assert (rank, count) == (4, min(shape) // 4)
    change = sum(np.outer(b[:, i * count + j], weights[i, j] * a[i] * columns[j]) for i in range(rank) for j in range(count))
    change = change if shape[0] > shape[1] else change.T
    want = np.asarray(matrix(*shape), np.float64) + 2 * change
    close(kernel, want)
    assert np.linalg.matrix_rank(change) == min(shape)
    assert 0.8 < a.std() < 1.2 and 0.8 < b.std() < 1.2


def test_delora_stays_within_its_bound():
    """W + bound / r · diag(‖rows‖) Σ a b ᵀ / (‖a‖ ‖b‖): each term is as long as the bound's share, whatever a and b are."""
    kernel, w, f = held("delora(rank=4, bound=2.0)")
    norms = np.linalg.norm(w, axis=-1, keepdims=True)
    np.testing.assert_allclose(f["norms"], norms[..., 0], rtol=1e-6)
    units = [f[x] / np.linalg.norm(f[x], axis=axis, keepdims=True) for x, axis in (("a", -2), ("b", -1))]
    change = f["bound"][:, None, None] / 4 * (units[0] @ units[1])
    close(kernel, w + norms * change)
    larger = kernel.replace(a=100 * kernel.a, b=0.01 * kernel.b)
    close(larger, w + norms * change)
    assert (np.linalg.norm(change, axis=(-2, -1)) <= f["bound"] + 1e-9).all()


def test_hira_multiplies_entry_by_entry():
    kernel, w, f = held("hira(rank=2)")
    close(kernel, w * (1 + f["a"] @ f["b"]))
    assert np.linalg.matrix_rank((w * (f["a"] @ f["b"]))[0]) == D_OUT, "more than A B has"


@pytest.mark.parametrize("rule, words", [
    ("delora(rank=0)", "rank 0"),
    ("hira(rank=0)", "rank 0 does not fit a 24x16 matrix; smallest: 1"),
    ("loha(rank=0)", "rank 0 does not fit a 24x16 matrix; smallest: 1"),
    ("lokr(rank=-1)", "rank -1"),
    ("lokr(factor=0)", "lokr: factor 0; it is a size above 0, or -1"),
    ("vera(rank=0)", "rank 0"),
    ("randlora(rank=0)", "rank 0"),
])  # fmt: skip
def test_unfit_ranks(rule, words):
    with pytest.raises(UserError, match=f"w/kernel: {words}"):
        adapted(rule)
