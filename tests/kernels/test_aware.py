COUNTS = {
    "glora": lambda d_in, d_out, rank, form: 2 * rank * (d_in + d_out),
    "para": lambda d_in, d_out, rank, projection: rank * d_out,
    "deft": lambda d_in, d_out, rank, scale, projection: rank * (d_in + d_out),
    "peanut": lambda d_in, d_out, rank, depth, activation, scale: 2 * rank * d_out + 2 * depth * rank**2,
    "psoft": lambda d_in, d_out, rank, even, scales, terms: rank * (rank - 1) // 2 + 2 * rank,
    "supra": lambda d_in, d_out, share, pick, rank, alpha: max(1, round(share * d_in * d_out)) + rank * (d_in + d_out),
}
