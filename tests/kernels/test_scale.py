"""(IA)³ against its closed form."""

COUNTS = {"ia3": lambda d_in, d_out, side: d_out if side == "out" else d_in}
