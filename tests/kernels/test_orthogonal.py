"""OFT and BOFT: R is orthogonal, and the products are those of the matrices written out."""

COUNTS = {
    "oft": lambda d_in, d_out, block, share, terms: (block if share else d_in) * (block - 1) // 2,
    "boft": lambda d_in, d_out, block, factors: factors * d_in * block + d_out,
}
