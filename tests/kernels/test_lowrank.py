"""Low-rank kernels against their closed forms."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import kernels, masks, tree
from tests.kernels.trees import D_IN, D_OUT, LAYERS, adapted, matrix, moved

COUNTS = {
    **dict.fromkeys(("lora", "rslora", "pissa", "olora"), lambda d_in, d_out, rank, alpha: rank * (d_in + d_out)),
    **dict.fromkeys(("lora_b", "lora_fa"), lambda d_in, d_out, rank, alpha: rank * d_out),
    "dora": lambda d_in, d_out, rank, alpha: rank * (d_in + d_out) + d_out,
}
LOW_RANK = {"lora": lambda alpha, rank: alpha / rank, "rslora": lambda alpha, rank: alpha / rank**0.5}


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("rank, alpha, stack", [(1, 16.0, ()), (4, 2.0, (LAYERS,)), (D_OUT, 8.0, ())])
def test_low_rank_sizes_and_scale(name, rank, alpha, stack):
    """r (d_in + d_out) parameters; ΔW = scale · A B, A uniform within 1/sqrt(d_in)."""
    params = adapted(f"{name}(rank={rank}, alpha={alpha})", shape=(*stack, D_IN, D_OUT))
    trainable, _ = tree.split(params, masks.declared(params, 0))
    assert tree.count(trainable) == np.prod(stack, dtype=int) * rank * (D_IN + D_OUT)
    a = np.asarray(params["w"]["kernel"].a)
    assert 0.8 * D_IN**-0.5 < np.abs(a).max() <= D_IN**-0.5
    assert len(np.unique(a)) == a.size, "layers and entries are drawn independently"
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(b"w/kernel"))
    np.testing.assert_array_equal(a, jax.random.uniform(key, a.shape, jnp.float32, -(D_IN**-0.5), D_IN**-0.5))
    kernel = moved(params)["w"]["kernel"]
    delta = LOW_RANK[name](alpha, rank) * (np.asarray(kernel.a, np.float64) @ np.asarray(kernel.b, np.float64))
    expected = delta + np.asarray(matrix(*stack, D_IN, D_OUT), np.float64)
    np.testing.assert_allclose(kernel.dense(), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("rank, alpha, stack", [(1, 16.0, ()), (4, 2.0, (LAYERS,)), (D_OUT, 8.0, ())])
def test_lora_b_freezes_orthonormal_columns(rank, alpha, stack):
    """AᵀA = I, signs fixed by R's diagonal in A R = the draw; r d_out parameters, W + alpha / r · A B."""
    params = adapted(f"lora_b(rank={rank}, alpha={alpha})", shape=(*stack, D_IN, D_OUT))
    trainable, _ = tree.split(params, masks.declared(params, 0))
    assert list(tree.flatten(trainable)) == ["w/kernel/b"]
    assert tree.count(trainable) == np.prod(stack, dtype=int) * rank * D_OUT
    kernel = moved(params)["w"]["kernel"]
    a, b = np.asarray(kernel.a, np.float64), np.asarray(kernel.b, np.float64)
    np.testing.assert_allclose(np.swapaxes(a, -1, -2) @ a, np.broadcast_to(np.eye(rank), (*stack, rank, rank)), atol=1e-6)
    np.testing.assert_allclose(kernel.dense(), matrix(*stack, D_IN, D_OUT) + alpha / rank * (a @ b), rtol=0, atol=1e-5)
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(b"w/kernel"))
    draw = np.asarray(jax.random.normal(key, (*stack, D_IN, rank)), np.float64)
    assert (np.diagonal(np.swapaxes(a, -1, -2) @ draw, axis1=-2, axis2=-1) > 0).all()


@pytest.mark.parametrize("rank, alpha, stack", [(1, 16.0, ()), (4, 2.0, (LAYERS,)), (D_OUT, 8.0, ())])
def test_pissa_splits_the_spectrum(rank, alpha, stack):
    """s A B is the best rank-r part, AᵀA = B Bᵀ = S_r / s, the base holds what is left."""
    w = np.asarray(matrix(*stack, D_IN, D_OUT), np.float64)
    kernel = adapted(f"pissa(rank={rank}, alpha={alpha})", shape=w.shape)["w"]["kernel"]
    a, b, scale = np.asarray(kernel.a, np.float64), np.asarray(kernel.b, np.float64), alpha / rank
    u, s, v = np.linalg.svd(w, full_matrices=False)
    top = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    # float32 turns the cut a little where the singular values on both sides of it are close
    np.testing.assert_allclose(scale * (a @ b), top, rtol=0, atol=1e-4)
    np.testing.assert_allclose(kernel.base, w - top, rtol=0, atol=1e-4)
    sizes = s[..., None, :rank] / scale * np.eye(rank)
    np.testing.assert_allclose(np.swapaxes(a, -1, -2) @ a, sizes, rtol=0, atol=1e-4)
    np.testing.assert_allclose(b @ np.swapaxes(b, -1, -2), sizes, rtol=0, atol=1e-4)


def test_lora_fa_starts_as_lora_and_trains_b_alone():
    """Another draw than `lora_b`: A as LoRA has it, not orthonormal."""
    fa, lora = (adapted(n)["w"]["kernel"] for n in ("lora_fa", "lora"))
    np.testing.assert_array_equal(fa.a, lora.a)
    assert (type(fa).trainable, type(lora).trainable) == (("b",), ("a", "b"))


@pytest.mark.parametrize("stack", [(), (LAYERS,)])
def test_dora_keeps_the_magnitudes_apart(stack):
    """Column norms of W' are m whatever A and B do; the factored norm is that of W + s A B written out."""
    kernel = moved(adapted("dora(rank=4, alpha=2)", shape=(*stack, D_IN, D_OUT)))["w"]["kernel"]
    a, b, m = (np.asarray(x, np.float64) for x in (kernel.a, kernel.b, kernel.magnitude))
    direction = np.asarray(matrix(*stack, D_IN, D_OUT), np.float64) + 0.5 * (a @ b)
    norms = np.linalg.norm(direction, axis=-2)
    np.testing.assert_allclose(kernel.norms(), norms, rtol=1e-5)
    np.testing.assert_allclose(kernel.dense(), direction * (m / norms)[..., None, :], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(kernel.dense(), np.float64), axis=-2), np.abs(m), rtol=1e-5)
    start = adapted("dora", shape=(*stack, D_IN, D_OUT))["w"]["kernel"]
    np.testing.assert_allclose(start.magnitude, np.linalg.norm(matrix(*stack, D_IN, D_OUT), axis=-2), rtol=1e-5)


def test_doras_norms_are_constants_to_the_gradient():
    """Section 4.3: ∂y/∂A is that of (m / n) s x A B with n held; the free norm's would differ."""
    kernel, x = moved(adapted("dora(rank=4, alpha=2)"))["w"]["kernel"], matrix(5, D_IN, seed=2)

    def loss(a, held):
        k = kernel.replace(a=a)
        n = kernel.norms() if held else jnp.linalg.norm(kernel.base + 0.5 * a @ kernel.b, axis=0)
        return jnp.square((x @ (k.base + 0.5 * a @ k.b)) * (k.magnitude / n)).mean()

    got = jax.grad(lambda a: jnp.square(kernel.replace(a=a).dot(x)).mean())(kernel.a)
    np.testing.assert_allclose(got, jax.grad(lambda a: loss(a, True))(kernel.a), rtol=1e-4, atol=1e-6)
    assert np.abs(got - jax.grad(lambda a: loss(a, False))(kernel.a)).max() > 1e-3


def test_dora_survives_a_column_of_zeros():
    params = {"w": {"kernel": matrix(D_IN, D_OUT).at[:, 3].set(0.0)}}
    kernel = kernels.adapt(params, [(".*", "dora")], jax.random.key(0))["w"]["kernel"]
    assert np.isfinite(kernel.dot(matrix(5, D_IN))).all()


@pytest.mark.parametrize("rank, alpha, stack", [(1, 16.0, ()), (4, 2.0, (LAYERS,)), (D_OUT, 8.0, ())])
def test_olora_takes_the_first_directions_of_a_qr(rank, alpha, stack):
    """B's rows are orthonormal, A B is the part of W in the first ``rank`` columns of Q; W − s A B is frozen."""
    w = np.asarray(matrix(*stack, D_IN, D_OUT), np.float64)
    kernel = adapted(f"olora(rank={rank}, alpha={alpha})", shape=w.shape)["w"]["kernel"]
    a, b, scale = np.asarray(kernel.a, np.float64), np.asarray(kernel.b, np.float64), alpha / rank
    q, r = np.linalg.qr(np.swapaxes(w, -1, -2))
    part = np.swapaxes(q[..., :rank] @ r[..., :rank, :], -1, -2)
    np.testing.assert_allclose(a @ b, part, rtol=0, atol=1e-5)
    np.testing.assert_allclose(kernel.base, w - scale * part, rtol=0, atol=1e-4)
    np.testing.assert_allclose(b @ np.swapaxes(b, -1, -2), np.broadcast_to(np.eye(rank), (*stack, rank, rank)), atol=1e-5)
