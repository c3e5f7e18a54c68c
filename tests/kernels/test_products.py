"""LoHa, LoKr, VeRA, RandLoRA and SHiRA against their closed forms."""

from ft_jax.kernels.products import factorisation


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
    "shira": lambda d_in, d_out, rank: rank * (d_in + d_out),
}
