"""How each kind of PEFT adapter maps to a kernel: one row of ``KINDS`` a kind, one matrix at a time.

Torch stores matrices as ``[out, in]``, so every factor is transposed against ours.
"""

import numpy as np

from ft_jax.errors import UserError
from ft_jax.io import peft_aware, peft_fields, peft_rows
from ft_jax.io.peft_fields import Kind, alphas, is_norm, most_common, pattern, same, scale_of, whole_number
from ft_jax.kernels import LowRank
from ft_jax.kernels.aware import RemovedOrthogonal, ReplacedOrthogonal, SubspaceScaled, orthonormal
from ft_jax.kernels.blocks import BlockAffine, Shards
from ft_jax.kernels.lowrank import Dora, LowRankB
from ft_jax.kernels.orthogonal import Butterfly, Reflected, Rotated, RotatedBySeries, Turned, side
from ft_jax.kernels.products import Hadamard, Kronecker, RandomBases, SharedRank, factorisation
from ft_jax.kernels.scale import ScaledIn, ScaledOut
from ft_jax.kernels.sparse import Scattered
from ft_jax.kernels.subspace import Triplets

PADDED = (LowRank, Dora, Hadamard, Triplets)  # where zeros make a smaller rank as large as its neighbours'


def _even(fields):
    if fields["u"].shape[-1] % 2:
        raise UserError("layers without an adapter beside an odd number of reflections, which are never the identity")
    return {"u": np.ones_like(fields["u"])}


def _put_back(fields, w):
    return {"p": fields["p"], "r": np.asarray(w, np.float32) @ np.asarray(orthonormal(fields["p"])) / fields["scale"]}


def _always_removed(fields, w):
    raise UserError("layers without an adapter beside those of a PaRa by QR, which always removes directions")


# What a layer without an adapter holds where zeros would change it: fields of a layer with one, its matrix -> fields.
NEUTRAL = {
    ScaledIn: lambda fields, w: {"s": np.ones_like(fields["s"])},
    ScaledOut: lambda fields, w: {"s": np.ones_like(fields["s"])},
    Butterfly: lambda fields, w: {"scale": np.ones_like(fields["scale"])},
    Dora: lambda fields, w: {"magnitude": np.linalg.norm(np.asarray(w, np.float32), axis=0)},
    Reflected: lambda fields, w: _even(fields),
    Turned: lambda fields, w: {"sizes": np.ones_like(fields["sizes"])},
    SubspaceScaled: lambda fields, w: {n: np.ones_like(fields[n]) for n in ("into", "out")},
    ReplacedOrthogonal: _put_back,
    RemovedOrthogonal: _always_removed,
}
# Kernels whose PEFT form changes a layer's bias too: what it does, and bias -> bias.
ON_BIAS = {
    ScaledOut: ("(IA)³ scales", lambda kernel, bias: bias * kernel.s),
    Turned: ("RoAd turns", lambda kernel, bias: kernel.turn(bias)),
}

# LoRA and DoRA


def _read_lora(part):
    a, b = part.tensors["lora_A.weight"], part.tensors["lora_B.weight"]
    fields = {"a": a.T, "b": b.T, "scale": scale_of(part.config, part.module, a.shape[0])}
    if part.config.get("use_dora"):
        if "lora_magnitude_vector" not in part.tensors:
            raise UserError(f"{part.module} lacks lora_magnitude_vector")
        return Dora, fields | {"magnitude": part.tensors["lora_magnitude_vector"].reshape(-1)}
    return LowRank, fields


def _write_lora(found, use_rslora=False):
    tensors = {m: {"lora_A.weight": k.a.T, "lora_B.weight": k.b.T} for m, k in found.items()}
    dora = same(found, "the form", lambda k: "DoRA" if isinstance(k, Dora) else "LoRA") == "DoRA"
    if dora:
        tensors = {m: t | {"lora_magnitude_vector": found[m].magnitude} for m, t in tensors.items()}
    config = alphas(found, lambda k: k.a.shape[-1], "lora_alpha", 0.5 if use_rslora else 1.0)
    more = {"lora_dropout": 0.0, "use_rslora": use_rslora, "init_lora_weights": True, "use_dora": dora}
    return tensors, {}, config | more


# Products


def _read_loha(part):
    t, rank = part.tensors, part.tensors["hada_w1_b"].shape[0]
    fields = {"a1": t["hada_w1_b"].T, "b1": t["hada_w1_a"].T, "a2": t["hada_w2_b"].T, "b2": t["hada_w2_a"].T}
    return Hadamard, fields | {"scale": scale_of(part.config, part.module, rank)}


def _write_loha(found):
    tensors = {m: {"hada_w1_a": k.b1.T, "hada_w1_b": k.a1.T, "hada_w2_a": k.b2.T, "hada_w2_b": k.a2.T} for m, k in found.items()}
    return tensors, {}, alphas(found, lambda k: k.a1.shape[-1], "alpha") | {"init_weights": True}


def _read_lokr(part):
    def factors(name):
        t = part.tensors
        if name in t:
            return (t[name].T,)
        if not {f"{name}_a", f"{name}_b"} <= t.keys():
            raise UserError(f"{part.module} lacks {name}, or {name}_a and {name}_b")
        return t[f"{name}_b"].T, t[f"{name}_a"].T

    rank = pattern(part.config, "rank_pattern", part.module, part.config.get("r"))
    return Kronecker, {"left": factors("lokr_w1"), "right": factors("lokr_w2"), "scale": scale_of(part.config, part.module, rank)}


def _write_lokr(found):
    tensors = {}
    for module, k in found.items():
        tensors[module] = {}
        for name, arrays in (("lokr_w1", k.left), ("lokr_w2", k.right)):
            parts = {name: arrays[0].T} if len(arrays) == 1 else {f"{name}_b": arrays[0].T, f"{name}_a": arrays[1].T}
            tensors[module] |= parts
    ranks = {_lokr_rank(k) for k in found.values()} - {None}
    # Where both factors are whole, the rank is only what alpha is divided by, and any that makes them whole will do.
    rank = max(ranks, default=max(max(k.shape[-2:]) for k in found.values()))
    if len(ranks) > 1:
        raise UserError(f"{next(iter(found))}: LoKr factors of ranks {sorted(ranks)}; PEFT's file is written with one")
    alphas, others = most_common({m: whole_number(float(k.scale) * rank) for m, k in found.items()})
    factor, both = _decomposition(found, rank)
    return tensors, {}, {"r": rank, "alpha": alphas, "alpha_pattern": others, "rank_pattern": {}, "decompose_factor": factor,
                         "decompose_both": both, "init_weights": True}  # fmt: skip


def _lokr_rank(kernel):
    return next((f[0].shape[-1] for f in (kernel.left, kernel.right) if len(f) == 2), None)


def _decomposition(found, rank):
    """The config's ``(decompose_factor, decompose_both)`` under which PEFT gives every matrix the shapes that it has."""
    sides = {k.left[0].shape[-2] for k in found.values()} | {k.left[-1].shape[-1] for k in found.values()}

    def fits(kernel, factor, both):
        (m, n), (l, k) = (factorisation(size, factor) for size in kernel.shape[-2:])  # noqa: E741
        pairs = both and rank < max(m, l) / 2, rank < max(n, k) / 2
        held = (kernel.left[0].shape[-2], kernel.right[0].shape[-2]), (kernel.left[-1].shape[-1], kernel.right[-1].shape[-1])
        return held == ((m, n), (l, k)) and (len(kernel.left) == 2, len(kernel.right) == 2) == pairs

    for factor in (-1, *sorted(sides)):
        for both in (False, True):
            if all(fits(k, factor, both) for k in found.values()):
                return factor, both
    raise UserError(f"{next(iter(found))}: no decompose_factor gives all matrices the Kronecker factors that they have")


def _read_vera(part):
    out, d_in = part.shape
    a, b = part.shared["vera_A"], part.shared["vera_B"]
    if a.shape[1] < d_in or b.shape[0] < out:
        raise UserError(f"{part.module}: vera_A {list(a.shape)} and vera_B {list(b.shape)} are too small for {out}x{d_in}: "
                        "an adapter for another base")
    return SharedRank, {"a": a[:, :d_in].T, "b": b[:out].T, "inner": part.tensors["vera_lambda_d"],
                        "outer": part.tensors["vera_lambda_b"]}  # fmt: skip


def _write_vera(found):
    rank = same(found, "the rank", lambda k: k.a.shape[-1])
    wide, tall = (max(found.values(), key=lambda k, axis=axis: k.shape[axis]) for axis in (-2, -1))
    tensors = {}
    for module, k in found.items():
        # Kaiming's bound depends on d_in, while PEFT cuts one A for all: the ratio goes into d.
        ratio = np.linalg.norm(k.a) / np.linalg.norm(wide.a[: len(k.a)])
        if not (np.allclose(k.a, ratio * wide.a[: len(k.a)], atol=1e-6) and np.array_equal(k.b, tall.b[:, : k.b.shape[-1]])):
            raise UserError(f"{module}: its random projection is not that of the other matrices, and PEFT shares one")
        tensors[module] = {"vera_lambda_d": (ratio * k.inner).astype(np.float32), "vera_lambda_b": k.outer}
    shared = {"vera_A": wide.a.T, "vera_B": tall.b.T}
    return tensors, shared, {"r": rank, "projection_prng_key": 0, "save_projection": True, "vera_dropout": 0.0, "d_initial": 0.1}


def _read_randlora(part):
    weights, columns = part.tensors["randlora_lambda"], part.tensors["randlora_gamma"]
    (rank, count), small, large = weights.shape, min(part.shape), max(part.shape)
    a, b = part.shared["randlora_A"], part.shared["randlora_B"]
    if a.shape[2] < small or b.shape[0] < large or b.shape[1] < count or (a.shape[0], b.shape[2]) != (rank, rank):
        raise UserError(f"{part.module}: randlora_A {list(a.shape)} and randlora_B {list(b.shape)} do not fit "
                        f"{part.shape[0]}x{part.shape[1]} at rank {rank}: an adapter for another base")
    scale = np.float32(part.config["randlora_alpha"] / rank)
    return RandomBases, {"a": a[:, 0, :small], "b": b[:large, :count].reshape(large, -1), "weights": weights,
                         "columns": columns, "scale": scale}  # fmt: skip


def _write_randlora(found):
    rank = same(found, "the rank", lambda k: k.weights.shape[-2])
    scale = same(found, "the scale", lambda k: float(k.scale))
    small, large = sorted(max(k.shape[axis] for k in found.values()) for axis in (-2, -1))
    a = np.zeros((rank, small), np.float32)
    b = np.zeros((large, -(-small // rank) * rank), np.float32)
    for k in found.values():
        a[:, : k.a.shape[1]] = k.a
        b[: k.b.shape[0], : k.b.shape[1]] = k.b
    for module, k in found.items():
        if not (np.array_equal(a[:, : k.a.shape[1]], k.a) and np.array_equal(b[: k.b.shape[0], : k.b.shape[1]], k.b)):
            raise UserError(f"{module}: its random bases are not those of the other matrices, and PEFT shares them")
    tensors = {m: {"randlora_lambda": k.weights, "randlora_gamma": k.columns} for m, k in found.items()}
    shared = {"randlora_A": a[:, None], "randlora_B": b.reshape(large, -1, rank)}
    return tensors, shared, {"r": rank, "randlora_alpha": whole_number(scale * rank), "projection_prng_key": 0,
                             "save_projection": True, "sparse": False, "very_sparse": False, "randlora_dropout": 0.0}  # fmt: skip


def _read_shira(part):
    rows, columns = part.tensors["shira_indices"]
    out, d_in = part.shape
    if rows.max(initial=0) >= out or columns.max(initial=0) >= d_in:
        raise UserError(f"{part.module}: shira_indices lie outside {out}x{d_in}: an adapter for another base")
    return Scattered, {"values": part.tensors["shira_weight"], "places": (columns * out + rows).astype(np.int32)}


def _write_shira(found):
    tensors, ranks = {}, {}
    for module, k in found.items():
        d_in, d_out = k.shape[-2:]
        columns, rows = np.divmod(k.places, d_out)
        tensors[module] = {"shira_weight": k.values, "shira_indices": np.stack([rows, columns]).astype(np.int32)}
        ranks[module], left = divmod(len(k.places), d_in + d_out)
        if left:
            raise UserError(f"{module}: {len(k.places)} places; PEFT's SHiRA takes a multiple of {d_in + d_out} there")
    rank, others = most_common(ranks)
    if others:
        raise UserError(f"{next(iter(others))}: rank {next(iter(others.values()))}, and {rank} elsewhere; PEFT's SHiRA has one")
    return tensors, {}, {"r": rank, "mask_type": "random", "init_weights": True}


# Rotations


def _read_oft(part):
    skew = part.tensors["oft_R.weight"]
    if not part.config.get("use_cayley_neumann", True):
        return Rotated, {"skew": skew}
    return RotatedBySeries, {"skew": skew, "series": peft_fields.series_of(part.config)}


def _write_oft(found):
    terms = peft_fields.terms_of(found, lambda k: k.series.shape[-1] if isinstance(k, RotatedBySeries) else 0)
    block = same(found, "the block", lambda k: side(k.skew.shape[-1]))
    shared = {m: k.skew.shape[-2] == 1 and k.shape[-2] != block for m, k in found.items()}
    one = any(shared.values())
    if one and any(k.skew.shape[-2] != 1 for k in found.values()):
        raise UserError(f"{next(m for m, s in shared.items() if s)}: shares one block, other matrices do not; PEFT has one for all")
    return {m: {"oft_R.weight": k.skew} for m, k in found.items()}, {}, {
        "r": 0, "oft_block_size": block, "block_share": one, "coft": False, "module_dropout": 0.0, "init_weights": True,
        "use_cayley_neumann": bool(terms), "num_cayley_neumann_terms": terms or 5,
    }  # fmt: skip


def _read_boft(part):
    return Butterfly, {"blocks": part.tensors["boft_R"], "scale": part.tensors["boft_s"].reshape(-1)}


def _write_boft(found):
    tensors = {m: {"boft_R": k.blocks, "boft_s": k.scale[:, None]} for m, k in found.items()}
    return tensors, {}, {
        "boft_block_size": same(found, "the block", lambda k: k.blocks.shape[-1]), "boft_block_num": 0,
        "boft_n_butterfly_factor": same(found, "the number of factors", lambda k: k.blocks.shape[-4]),
        "boft_dropout": 0.0, "init_weights": True,
    }  # fmt: skip


# Scales and blocks


def _read_ia3(part):
    s = part.tensors["ia3_l"]
    return (ScaledOut if s.shape[-1] == 1 and s.shape[0] == part.shape[0] else ScaledIn), {"s": s.reshape(-1)}


def _write_ia3(found):
    inside = sorted(m for m, k in found.items() if isinstance(k, ScaledIn))
    tensors = {m: {"ia3_l": k.s[None] if m in inside else k.s[:, None]} for m, k in found.items()}
    return tensors, {}, {"feedforward_modules": inside, "init_ia3_weights": True}


def _read_miss(part):
    m, form = part.tensors["miss_block"], part.config.get("init_weights")
    if form == "bat":
        return BlockAffine, {"m": np.swapaxes(m, -1, -2)}
    if form != "mini" and m.shape[-1] != part.shape[0]:
        raise UserError(f"{part.module}: miss_block {list(m.shape)} is not for a matrix of {part.shape[0]} outputs")
    return Shards, {"m": m}


def _write_miss(found):
    config = {"r": same(found, "the rank", lambda k: k.m.shape[-1 if isinstance(k, BlockAffine) else -2]), "mini_r": 1,
              "miss_dropout": 0.0, "init_weights": True}  # fmt: skip
    form = same(found, "the form", lambda k: type(k).__name__)
    if form == "BlockAffine":
        return {m: {"miss_block": np.swapaxes(k.m, -1, -2)} for m, k in found.items()}, {}, config | {"init_weights": "bat"}
    if any(k.m.shape[-1] != k.shape[-1] for k in found.values()):
        config |= {"init_weights": "mini", "mini_r": same(found, "mini", lambda k: k.m.shape[-1])}
    return {m: {"miss_block": k.m} for m, k in found.items()}, {}, config


_NO_LORA = (
    "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "velora_config", "monteclora_config", "arrow_config", "kasa_config", "megatron_config",
)  # fmt: skip
_LOKR = ("lokr_w1?", "lokr_w1_a?", "lokr_w1_b?", "lokr_w2?", "lokr_w2_a?", "lokr_w2_b?")
KINDS = {
    kind.peft_type: kind
    for kind in (
        Kind("LORA", (LowRank, LowRankB, Dora), ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector?"), _read_lora,
             _write_lora, _NO_LORA, numbers=("lora_alpha",)),
        Kind("LOHA", (Hadamard,), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _read_loha, _write_loha,
             numbers=("alpha",), fixed=()),
        Kind("LOKR", (Kronecker,), _LOKR, _read_lokr, _write_lokr, numbers=("alpha", "r"), fixed=()),
        Kind("VERA", (SharedRank,), ("vera_lambda_b", "vera_lambda_d"), _read_vera, _write_vera, shared=("vera_A", "vera_B")),
        Kind("RANDLORA", (RandomBases,), ("randlora_lambda", "randlora_gamma"), _read_randlora, _write_randlora,
             shared=("randlora_A", "randlora_B"), numbers=("randlora_alpha",)),
        Kind("SHIRA", (Scattered,), ("shira_weight", "shira_indices"), _read_shira, _write_shira,
             fixed=("fan_in_fan_out",)),
        Kind("OFT", (Rotated, RotatedBySeries), ("oft_R.weight",), _read_oft, _write_oft, ("coft",)),
        Kind("BOFT", (Butterfly,), ("boft_R", "boft_s"), _read_boft, _write_boft),
        Kind("IA3", (ScaledIn, ScaledOut), ("ia3_l",), _read_ia3, _write_ia3, fixed=("fan_in_fan_out",)),
        Kind("MISS", (Shards, BlockAffine), ("miss_block",), _read_miss, _write_miss, fixed=("bias",)),
        *peft_rows.ROWS,
        *peft_aware.ROWS,
        Kind("LN_TUNING", (), (), None, None, fixed=(), holds=is_norm),
        *(Kind(name, (), (), None, None, shared=("prompt_embeddings",), numbers=("num_virtual_tokens",), fixed=())
          for name in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")),  # taps: ft_jax/io/peft_prompts.py
    )
}  # fmt: skip
