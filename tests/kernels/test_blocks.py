"""MiSS and Bone against their closed forms."""

COUNTS = {
    "miss": lambda d_in, d_out, rank, mini: rank * (mini or d_out),
    "bone": lambda d_in, d_out, rank: rank * d_out,
}
