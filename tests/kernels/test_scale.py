"""(IA)³ against its closed form."""

import numpy as np
import pytest

from ft_jax.errors import UserError
from ft_jax.kernels.scale import ScaledIn, ScaledOut
from tests.kernels.trees import D_IN, D_OUT, LAYERS, adapted, matrix, moved

COUNTS = {"ia3": lambda d_in, d_out, side: d_out if side == "out" else d_in}


@pytest.mark.parametrize("side, kind, size", [("out", ScaledOut, D_OUT), ("in", ScaledIn, D_IN)])
def test_a_diagonal_on_either_side(side, kind, size):
    kernel = moved(adapted(f"ia3(side={side})", shape=(LAYERS, D_IN, D_OUT)))["w"]["kernel"]
    assert type(kernel) is kind and kernel.s.shape == (LAYERS, size)
    w, s = (np.asarray(x, np.float64) for x in (matrix(LAYERS, D_IN, D_OUT), kernel.s))
    want = np.stack([x @ np.diag(d) if side == "out" else np.diag(d) @ x for x, d in zip(w, s, strict=True)])
    np.testing.assert_allclose(kernel.dense(), want, rtol=1e-6)


def test_a_side_that_is_none():
    with pytest.raises(UserError, match="w/kernel: ia3: no side 'inn'; nearest: 'in'"):
        adapted("ia3(side=inn)")
