"""Kernels whose change of W is made from W: the products are those of the formulas written out, and what each one keeps of W."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from ft_jax.errors import UserError
from ft_jax.kernels.aware import orthonormal, principal
from tests.kernels.trees import D_IN, D_OUT, LAYERS, adapted, matrix, moved

COUNTS = {
    "glora": lambda d_in, d_out, rank, form: 2 * rank * (d_in + d_out),
    "para": lambda d_in, d_out, rank, projection: rank * d_out,
    "deft": lambda d_in, d_out, rank, scale, projection: rank * (d_in + d_out),
    "peanut": lambda d_in, d_out, rank, depth, activation, scale: 2 * rank * d_out + 2 * depth * rank**2,
    "psoft": lambda d_in, d_out, rank, even, scales, terms: rank * (rank - 1) // 2 + 2 * rank,
    "supra": lambda d_in, d_out, share, pick, rank, alpha: max(1, round(share * d_in * d_out)) + rank * (d_in + d_out),
}


def glora(w, f):
    return w * (1 + f.a @ f.b) + f.c @ f.d


def glora_by_output(w, f):
    return w @ np.diag(1 + np.broadcast_to(f.s, D_OUT)) + np.ones((D_IN, 1)) * f.t


def para_relu(w, f):
    return w @ (np.eye(D_OUT) - np.maximum(f.p, 0) @ f.p.T)


def projector(p):
    return p @ np.linalg.inv(p.T @ p) @ p.T


def para(w, f):
    return w @ (np.eye(D_OUT) - projector(f.p))


def deft(w, f):
    return para_relu(w, f) + f.scale * f.r @ f.p.T


def deft_qr(w, f):
    """Q of P = Q R with R's diagonal positive is P over the Cholesky factor of PᵀP."""
    return para(w, f) + f.scale * f.r @ np.linalg.inv(np.linalg.cholesky(f.p.T @ f.p)) @ f.p.T


def peanut(activation):
    def written_out(w, f):
        h = activation(w @ f.a)
        held = []
        for encoder in f.encoders:
            held = [h, *held]
            h = activation(h @ encoder)
        for decoder, residual in zip(f.decoders, held, strict=True):
            h = activation(h @ decoder) + residual
        return w + f.scale * h @ f.b

    return written_out


def psoft(w, f):
    """Between the top singular vectors; what is left of W stays."""
    rank, s = f.left.shape[1], np.zeros((f.left.shape[1],) * 2)
    s[np.triu_indices(rank, 1)] = f.skew
    s = s - s.T
    turn = (np.eye(rank) - s) @ np.linalg.inv(np.eye(rank) + s)
    if f.series is not None:
        turn = np.eye(rank) - 2 * s + 2 * s @ s - 2 * s @ s @ s + s @ s @ s @ s
    if hasattr(f, "into"):
        turn = np.diag(f.into) @ turn @ np.diag(f.out)
    return w - f.left @ f.right + f.left @ turn @ f.right


def supra(w, f):
    out = w.copy().reshape(-1)
    out[f.places.astype(int)] += f.values
    return out.reshape(w.shape) + f.scale * f.a @ f.b


def gelu(x):
    return x * 0.5 * (1 + scipy.special.erf(x / 2**0.5))


RULES = {
    "glora(rank=3)": glora,
    "glora(form=vector)": glora_by_output,
    "glora(form=constant)": glora_by_output,
    "para(rank=3)": para,
    "para(rank=3, projection=relu)": para_relu,
    "deft(rank=3, scale=2.0)": deft,
    "deft(rank=3, scale=2.0, projection=qr)": deft_qr,
    "peanut(rank=4, scale=0.5)": peanut(lambda x: np.maximum(x, 0)),
    "peanut(rank=4, depth=2, activation=gelu)": peanut(gelu),
    "peanut(rank=4, depth=1, activation=silu)": peanut(lambda x: x * scipy.special.expit(x)),
    "peanut(rank=4, depth=3, activation=tanh)": peanut(np.tanh),
    "psoft(rank=5)": psoft,
    "psoft(rank=5, even=True, scales=False)": psoft,
    "psoft(rank=4, terms=5)": psoft,
    "supra(share=0.1, pick=smallest, rank=2)": supra,
}


@pytest.mark.parametrize("rule", RULES)
def test_products_are_those_of_the_formula(rule):
    kernel, w, x = moved(adapted(rule, shape=(LAYERS, D_IN, D_OUT)))["w"]["kernel"], matrix(LAYERS, D_IN, D_OUT), matrix(5, D_IN, seed=2)
    for i in range(LAYERS):
        one = jax.tree.map(lambda y, i=i: y[i], kernel)
        want = RULES[rule](np.asarray(w[i], np.float64), jax.tree.map(lambda y: np.asarray(y, np.float64), one))
        scale = np.abs(want).max()
        np.testing.assert_allclose(kernel.dense()[i], want, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(one.dot(x), np.asarray(x, np.float64) @ want, rtol=0, atol=2e-5 * np.abs(np.asarray(x) @ want).max())


def test_para_removes_its_directions_and_deft_puts_others_there():
    w = np.asarray(matrix(D_IN, D_OUT), np.float64)
    removed = moved(adapted("para(rank=3)"))["w"]["kernel"]
    assert np.linalg.matrix_rank(np.asarray(removed.dense()), tol=1e-4) == D_OUT - 3
    np.testing.assert_allclose(removed.dense() @ removed.p, 0, atol=1e-4)
    replaced = moved(adapted("deft(rank=3, projection=qr)"))["w"]["kernel"]
    outside = np.eye(D_OUT) - projector(np.asarray(replaced.p, np.float64))
    np.testing.assert_allclose(replaced.dense() @ outside, w @ outside, atol=1e-4)
    np.testing.assert_allclose(replaced.dense() @ orthonormal(replaced.p), replaced.r, atol=1e-4)


def test_the_orthonormal_columns_do_not_depend_on_the_librarys_signs():
    p = matrix(LAYERS, 9, 4)
    q = np.asarray(orthonormal(p))
    np.testing.assert_allclose(np.swapaxes(q, -1, -2) @ q, np.broadcast_to(np.eye(4), (LAYERS, 4, 4)), atol=1e-5)
    r = np.swapaxes(q, -1, -2) @ np.asarray(p)
    np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-5)
    assert (np.diagonal(r, axis1=-2, axis2=-1) > 0).all()


@pytest.mark.parametrize("even", [False, True])
def test_psoft_turns_the_main_subspace_and_keeps_the_spectrum(even):
    """Without scales a turn of the pairs: the angles between the main part's columns stay, and all that is smaller."""
    w = matrix(LAYERS, D_IN, D_OUT)
    kernel = moved(adapted(f"psoft(rank=4, even={even}, scales=False)", shape=w.shape))["w"]["kernel"]
    for i in range(LAYERS):
        left, right = (np.asarray(y[i], np.float64) for y in (kernel.left, kernel.right))
        u, sizes, v = scipy.linalg.svd(np.asarray(w[i], np.float64), full_matrices=False)
        np.testing.assert_allclose(left @ right, (u[:, :4] * sizes[:4]) @ v[:4], atol=1e-4)
        rest = np.asarray(w[i]) - left @ right
        main = np.asarray(kernel.dense()[i], np.float64) - rest
        np.testing.assert_allclose(main @ v[4:].T, 0, atol=1e-4)  # it stays in the subspace
        assert np.abs(main - left @ right).max() > 0.1
        if not even:
            np.testing.assert_allclose(main.T @ main, right.T @ right, atol=1e-3)
            np.testing.assert_allclose(np.linalg.svd(main)[1], [*sizes[:4], *[0] * (D_OUT - 4)], atol=1e-4)
        largest = np.abs(left).argmax(0)
        assert (left[largest, range(4)] > 0).all()


def test_principal_is_the_same_whatever_signs_the_svd_has():
    """A matrix whose vectors are known, and the same with some pairs written with the other sign."""
    u, v = np.linalg.qr(np.asarray(matrix(9, 3)))[0], np.linalg.qr(np.asarray(matrix(7, 3, seed=1)))[0]
    w = jnp.asarray((u * [3.0, 2.0, 1.0]) @ v.T)
    left, right = (np.asarray(y) for y in principal(w, 3))
    signs = np.sign((left * u).sum(0))
    np.testing.assert_allclose(left, u * signs, atol=1e-5)
    np.testing.assert_allclose(right, (v * signs * [3.0, 2.0, 1.0]).T, atol=1e-5)
    assert (left[np.abs(left).argmax(0), range(3)] > 0).all()


@pytest.mark.parametrize("rule", ["glora(rank=2)", "glora(form=vector)", "psoft(rank=3)", "peanut(rank=3, depth=1)", "deft(rank=2)"])
def test_no_two_fields_are_one_buffer(rule):
    """A step donates its state, and a buffer cannot be given away twice."""
    leaves = jax.tree.leaves(adapted(rule)["w"]["kernel"])
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


def test_supra_is_sparse_beside_lora():
    """The places of `sparse`, the factors of `lora`, and both move."""
    kernel, alone, low = (adapted(rule)["w"]["kernel"] for rule in ("supra(share=0.05, rank=2, alpha=6)", "sparse(share=0.05)", "lora(rank=2, alpha=6)"))
    np.testing.assert_array_equal(kernel.places, alone.places)
    np.testing.assert_array_equal(kernel.a, low.a)
    assert float(kernel.scale) == float(low.scale) == 3


@pytest.mark.parametrize("rule, words", [
    ("glora(rank=17)", "rank 17 does not fit a 24x16 matrix; largest: 16"),
    ("glora(form=vectro)", "glora: form 'vectro' is none of lora, vector, constant; nearest: 'vector'"),
    ("para(rank=0)", "rank 0 does not fit a 24x16 matrix"),
    ("para(projection=svd)", "para: projection 'svd' is none of relu, qr"),
    ("deft(rank=17)", "rank 17 does not fit a 24x16 matrix; largest: 16"),
    ("deft(scale=0.0)", "deft: a scale of 0 leaves nothing .*; nearest: 1"),
    ("peanut(rank=17)", "rank 17 does not fit a 24x16 matrix; largest: 16"),
    ("peanut(rank=4, depth=-1)", "peanut: depth -1 is negative; nearest: 0"),
    ("peanut(rank=4, activation=rleu)", "peanut: activation 'rleu' is none of relu, gelu, silu, tanh; nearest: 'relu'"),
    ("psoft(rank=17)", "rank 17 does not fit a 24x16 matrix; largest: 16"),
    ("psoft(rank=1)", "psoft: rank 1 leaves nothing to turn; nearest: 2"),
    ("psoft(rank=4, terms=1)", "psoft: a series of 1 terms holds no rotation"),
    ("supra(rank=17)", "rank 17 does not fit a 24x16 matrix; largest: 16"),
    ("supra(share=0.0)", "share 0.0 of the weights is not above 0"),
    ("supra(pick=bigest)", "pick 'bigest' is no way to choose weights"),
])  # fmt: skip
def test_unfit_hyper_parameters(rule, words):
    with pytest.raises(UserError, match=f"w/kernel: {words}"):
        adapted(rule)
