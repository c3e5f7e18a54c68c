"""Rows of the table in `peft_kinds`: the kernels that make their change from the matrix itself."""

import numpy as np

from ft_jax.errors import UserError, nearest
from ft_jax.io.peft_fields import Kind, same, scale_of, series_of, terms_of, whole_number
from ft_jax.kernels import aware
from ft_jax.kernels.orthogonal import side
from ft_jax.kernels.sparse import Sparse

# GLoRA: W + W ⊙ A + B, and b + b ⊙ D + E + W C where there is a bias


def _read_glora(part):
    t, form = part.tensors, part.config.get("config_A_B", "lora")
    if form not in ("lora", "vector", "constant"):
        raise UserError(f"config_A_B {form!r} is not supported; supported: lora, vector, constant")
    names = [f"glora_{x}.{y}" for x in "AB" for y in (("Xu", "Xd") if form == "lora" else ("X",))]
    for name in names:
        if name not in t:
            raise UserError(f"{part.module} lacks {name}")
    if form == "lora":
        return aware.Generalised, dict(zip("abcd", (t[n].T for n in names), strict=True))
    return aware.GeneralisedByOutput, {"s": t["glora_A.X"].reshape(-1), "t": t["glora_B.X"].reshape(-1)}


def _glora_bias(part, bias):
    t = part.tensors
    d, e = (t.get(f"glora_{x}.X", np.zeros(1, np.float32)) for x in "DE")
    c = t["glora_C.Xd"] @ t["glora_C.Xu"] if "glora_C.Xd" in t else t.get("glora_C.X")
    return bias * (1 + d) + e + (0 if c is None else (part.base() @ c)[:, 0])


def _write_glora(found):
    rank = same(found, "the rank", lambda k: k.a.shape[-1] if isinstance(k, aware.Generalised) else 0)
    form = same(found, "the form", lambda k: "lora" if rank else "constant" if k.s.shape[-1] == 1 else "vector")
    tensors = {}
    for module, k in found.items():
        d_in, d_out = k.shape[-2:]
        parts = ((k.a, k.b), (k.c, k.d)) if rank else (k.s, k.t)
        tensors[module] = {f"glora_{x}.zeros": np.zeros(s, np.float32) for x, s in (("C", (d_in, 1)), ("D", d_out), ("E", d_out))}
        for name, part in zip("AB", parts, strict=True):
            own = {"Xu": part[0].T, "Xd": part[1].T} if rank else {"X": part[:, None] if form == "vector" else part}
            tensors[module] |= {f"glora_{name}.{n}": x for n, x in own.items()}
    return tensors, {}, {"r": rank or 8, "config_A_B": form, "config_C": "none", "config_D_E": "none", "init_weights": True}


# DEFT and PaRa


def _signs(p):
    """±1 of the columns of Q in P = Q R, as LAPACK leaves them and torch keeps them; the kernel has R's diagonal positive."""
    return np.where(np.diagonal(np.linalg.qr(p)[1]) < 0, -1, 1).astype(np.float32)


def _read_deft(part):
    p, r = part.tensors["deft_P"], part.tensors.get("deft_R")
    method, alpha = part.config.get("decomposition_method", "relu"), part.config.get("alpha")
    if method not in aware.PROJECTIONS:
        raise UserError(f"decomposition_method {method!r} is not supported; supported: {', '.join(aware.PROJECTIONS)}")
    if not isinstance(alpha, int | float | None):
        raise UserError(f"alpha is {alpha!r}")
    removed, replaced = aware.PROJECTIONS[method]
    if part.config.get("para"):
        return removed, {"p": p}
    if r is None:
        raise UserError(f"{part.module} lacks deft_R")
    scale = np.float32(alpha / p.shape[1] if alpha else 1)
    return replaced, {"p": p, "r": r.T * (_signs(p) if method == "qr" else 1), "scale": scale}


def _write_deft(found):
    rank = same(found, "the rank", lambda k: k.p.shape[-1])
    method = same(found, "the projection", lambda k: next(m for m, kernels in aware.PROJECTIONS.items() if type(k) in kernels))
    config = {"r": rank, "decomposition_method": method, "init_weights": True, "deft_dropout": 0.0}
    if same(found, "the form", lambda k: "DEFT" if isinstance(k, aware.Replaced) else "PaRa") == "PaRa":
        return {m: {"deft_P": k.p} for m, k in found.items()}, {}, config | {"para": True, "alpha": None}
    scale = same(found, "the scale", lambda k: float(k.scale))
    tensors = {m: {"deft_P": k.p, "deft_R": (k.r * (_signs(k.p) if method == "qr" else 1)).T} for m, k in found.items()}
    return tensors, {}, config | {"para": False, "alpha": None if scale == 1 else whole_number(scale * rank)}


# PEANuT

_DEEPEST = 8


def _read_peanut(part):
    t, act, depth = part.tensors, part.config.get("act_fn", "relu"), part.config["depth"]
    if act not in aware.ACTIVATIONS:
        raise UserError(f"act_fn {act!r} is not supported; supported: {', '.join(aware.ACTIVATIONS)}{nearest(act, aware.ACTIVATIONS)}")
    if depth not in range(_DEEPEST + 1):
        raise UserError(f"depth {depth} is not supported; supported: 0 to {_DEEPEST}")
    names = {way: [f"peanut_{way}.{i}.weight" for i in range(int(depth))] for way in ("encoders", "decoders")}
    for name in (*names["encoders"], *names["decoders"]):
        if name not in t:
            raise UserError(f"{part.module} lacks {name}")
    return aware.ACTIVATIONS[act], {"a": t["peanut_A.weight"].T, "b": t["peanut_B.weight"].T, "scale": np.float32(part.config["scaling"]),
                              **{way: tuple(t[n].T for n in own) for way, own in names.items()}}  # fmt: skip


def _write_peanut(found):
    act = same(found, "the activation", lambda k: next(name for name, kernel in aware.ACTIVATIONS.items() if type(k) is kernel))
    rank, depth = same(found, "the rank", lambda k: k.a.shape[-1]), same(found, "the depth", lambda k: len(k.encoders))
    if depth > _DEEPEST:
        raise UserError(f"{next(iter(found))}: depth {depth}; files are read and written up to {_DEEPEST}")
    tensors = {}
    for module, k in found.items():
        square = {f"peanut_{part}.{i}.weight": x.T for part in ("encoders", "decoders") for i, x in enumerate(getattr(k, part))}
        tensors[module] = {"peanut_A.weight": k.a.T, "peanut_B.weight": k.b.T} | square
    scale = whole_number(same(found, "the scale", lambda k: float(k.scale)))
    return tensors, {}, {"r": rank, "depth": depth, "act_fn": act, "scaling": scale, "init_weights": True}


# PSOFT


# ``w [out, in] -> Vᵀ [min(out, in), in]`` as ``torch.linalg.svd`` gives it where the adapter is used; this package has no torch.
SVD = None


def _principal_there(w, rank, left):
    """±1 of each pair of singular vectors of a stored matrix ``w [out, in]`` as PEFT's torch has them, against ``left``'s."""
    if SVD is None:
        raise UserError("PEFT's PSOFT file leaves the singular vectors out and finds them again, with signs that differ between "
                        "libraries: set io.peft_aware.SVD to the right singular vectors as PEFT's own library gives them")
    found = SVD(np.array(w))[:rank]
    cosines = np.einsum("ri,ir->r", found, left / np.linalg.norm(left, axis=0))
    if np.abs(cosines).min() < 0.999:
        raise UserError("singular values of the matrix are too close to tell their vectors apart, which PEFT's file leaves out")
    return np.sign(cosines).astype(np.float32)


def _turned(skew, signs):
    """The triangle of D S D, D = diag(signs)."""
    rows, columns = np.triu_indices(len(signs), 1)
    return skew * signs[rows] * signs[columns]


_PSOFT = {"psoft_orth": True, "psoft_svd": "full", "ab_svd_init": "psoft_init"}
_EVEN = "pissa_init"


def _read_psoft(part):
    t, config = part.tensors, _PSOFT | {"psoft_mag_a": True, "psoft_mag_b": True, "use_cayley_neumann": False} | part.config
    for field, allowed in (("psoft_orth", (True,)), ("psoft_svd", ("full",)), ("ab_svd_init", ("psoft_init", _EVEN)),
                           ("psoft_mag_b", (config["psoft_mag_a"],))):  # fmt: skip
        if config[field] not in allowed:
            raise UserError(f"{field} {config[field]!r} is not supported; supported: {', '.join(map(str, allowed))}")
    if config["use_cayley_neumann"] and config.get("cayley_neumann_eps") is not None:
        raise UserError(f"cayley_neumann_eps {config['cayley_neumann_eps']!r} is not supported; supported: null")
    w, rank = part.base(), side(t["psoft_R.weight"].size)
    if rank > min(part.shape):
        raise UserError(f"{part.module}: psoft_R.weight {list(t['psoft_R.weight'].shape)} is not for {part.shape[0]}x{part.shape[1]}")
    left, right = (np.asarray(x) for x in aware.principal(w.T, rank, config["ab_svd_init"] == _EVEN))
    fields = {"left": left, "right": right, "skew": _turned(t["psoft_R.weight"], _principal_there(w, rank, left))}
    if config["use_cayley_neumann"]:
        fields["series"] = series_of(config)
    if not config["psoft_mag_a"]:
        return aware.Subspace, fields
    return aware.SubspaceScaled, fields | {"into": t["psoft_R.vector_a"], "out": t["psoft_R.vector_b"]}


def _write_psoft(found):
    rank = same(found, "the rank", lambda k: k.left.shape[-1])
    scaled = same(found, "the form", lambda k: isinstance(k, aware.SubspaceScaled))
    even = same(found, "the split", lambda k: not np.allclose(np.linalg.norm(k.left, axis=0), 1, atol=1e-3))
    terms = terms_of(found, lambda k: 0 if k.series is None else k.series.shape[-1])
    tensors = {}
    for module, k in found.items():
        if not np.allclose(k.left @ k.right, np.matmul(*aware.principal(k.base, rank, even)), atol=1e-4):
            raise UserError(f"{module}: its subspace is not the main one of the matrix, and PEFT's file leaves it out")
        tensors[module] = {"psoft_R.weight": _turned(k.skew, _principal_there(k.base.T, rank, k.left))}
        if scaled:
            tensors[module] |= {"psoft_R.vector_a": k.into, "psoft_R.vector_b": k.out}
    return tensors, {}, _PSOFT | {
        "r": rank, "psoft_alpha": rank, "psoft_dropout": 0.0, "ab_svd_init": _EVEN if even else "psoft_init", "psoft_mag_a": scaled,
        "psoft_mag_b": scaled, "use_cayley_neumann": bool(terms), "num_cayley_neumann_terms": terms or 5, "init_weights": True,
    }  # fmt: skip


# Super-Tuning and Supra


def _read_super(part):
    (out, d_in), t = part.shape, part.tensors
    if "supertuning_indices" not in t:
        raise UserError(f"{part.module} lacks supertuning_indices; save it with save_precomputed_indices=True")
    rows, columns = np.divmod(t["supertuning_indices"], d_in)
    if rows.max(initial=0) >= out or rows.min(initial=0) < 0:
        raise UserError(f"{part.module}: supertuning_indices lie outside {out}x{d_in}: an adapter for another base")
    fields = {"values": t["supertuning_values"], "places": (columns * out + rows).astype(np.int32)}
    a, b = (t.get(f"supertuning_lora_{x}.weight") for x in "AB")
    if a is None or b is None:
        return Sparse, fields
    if not isinstance(part.config.get("lora_alpha"), int | float):
        raise UserError(f"lora_alpha is {part.config.get('lora_alpha')!r}")
    return aware.Supra, fields | {"a": a.T, "b": b.T, "scale": scale_of(part.config, part.module, len(a))}


def _sparsity(found):
    """The config's ``sparsity``, under which PEFT gives every matrix ⌊(1 − sparsity) · size⌋ places: as many as it has."""
    sizes = [(len(k.values), k.shape[-2] * k.shape[-1]) for k in found.values()]
    low, high = max(n / size for n, size in sizes), min((n + 1) / size for n, size in sizes)
    for digits in range(1, 17):
        value = round(1 - (low + high) / 2, digits)
        if 0 <= value < 1 and all(int(size * (1 - value)) == n for n, size in sizes):
            return value
    raise UserError(f"{next(iter(found))}: its matrices have {', '.join(f'{n} of {size}' for n, size in sizes[:4])} … places, which no "
                    "one sparsity of PEFT's config gives")  # fmt: skip


def _write_super(found):
    rank = same(found, "the rank", lambda k: k.a.shape[-1] if isinstance(k, aware.Supra) else 0)
    tensors = {}
    for module, k in found.items():
        d_in, d_out = k.shape[-2:]
        columns, rows = np.divmod(k.places, d_out)
        tensors[module] = {"supertuning_values": k.values, "supertuning_indices": (rows * d_in + columns).astype(np.int32)}
        if rank:
            tensors[module] |= {"supertuning_lora_A.weight": k.a.T, "supertuning_lora_B.weight": k.b.T}
    alpha = whole_number(same(found, "the scale", lambda k: float(k.scale)) * rank) if rank else None
    return tensors, {}, {"sparsity": _sparsity(found), "select_top": True, "r": rank or None, "lora_alpha": alpha, "lora_dropout": 0.0,
                         "save_precomputed_indices": True, "init_weights": True}  # fmt: skip


_GLORA = tuple(f"glora_{x}.{y}?" for x in "ABC" for y in ("Xd", "Xu", "X", "zeros")) + tuple(f"glora_{x}.{y}?" for x in "DE" for y in ("X", "zeros"))
_PEANUT = tuple(f"peanut_{part}.{i}.weight?" for part in ("encoders", "decoders") for i in range(_DEEPEST))
ROWS = (
    Kind("GLORA", (aware.Generalised, aware.GeneralisedByOutput), _GLORA, _read_glora, _write_glora, fixed=("bias",), on_bias=_glora_bias),
    Kind("DEFT", (aware.Removed, aware.RemovedOrthogonal, aware.Replaced, aware.ReplacedOrthogonal), ("deft_P", "deft_R?"), _read_deft, _write_deft),
    Kind("PEANUT", tuple(aware.ACTIVATIONS.values()), ("peanut_A.weight", "peanut_B.weight", *_PEANUT), _read_peanut, _write_peanut,
         numbers=("scaling", "depth"), fixed=()),
    Kind("PSOFT", (aware.Subspace, aware.SubspaceScaled), ("psoft_R.weight", "psoft_R.vector_a?", "psoft_R.vector_b?"), _read_psoft, _write_psoft,
         fixed=("fan_in_fan_out",)),
    Kind("SUPERTUNING", (Sparse, aware.Supra), ("supertuning_values", "supertuning_indices?", "supertuning_lora_A.weight?",
                                          "supertuning_lora_B.weight?"), _read_super, _write_super, fixed=()),
)  # fmt: skip
