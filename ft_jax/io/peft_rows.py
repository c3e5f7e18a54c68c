"""Rows of the table in `peft_kinds`: triplets, transforms, reflections and turns, several sorts of products, skills."""

import numpy as np

from ft_jax.errors import UserError
from ft_jax.io.peft_fields import Kind, is_norm, most_common, same, whole_number
from ft_jax.kernels.blocks import Granular
from ft_jax.kernels.mixture import SkillRouter, Skills
from ft_jax.kernels.orthogonal import Reflected, Turned
from ft_jax.kernels.products import Bounded, Multiplied
from ft_jax.kernels.spectrum import Circulant, Frequencies, Wavelets, places_of
from ft_jax.kernels.subspace import Triplets

_EPSILON = 1e-5  # PEFT's AdaLoRA divides by the rank plus this
_HAAR = ("db1", "haar")


def _read_adalora(part):
    rank = part.config["init_r"]  # also of matrices that were cut to fewer triplets
    alpha = part.config["lora_alpha"] if part.config["lora_alpha"] > 0 else float(rank)
    a, e, b = (part.tensors[f"lora_{x}"] for x in "AEB")
    if not len(a) == len(e) == b.shape[-1]:
        raise UserError(f"{part.module}: lora_A {list(a.shape)}, lora_E {list(e.shape)} and lora_B {list(b.shape)} make no adapter")
    return Triplets, {"a": a.T, "e": e.reshape(-1), "b": b.T, "scale": np.float32(alpha / (rank + _EPSILON))}


def _write_adalora(found):
    rank = same(found, "the rank", lambda k: k.a.shape[-1])
    alpha = same(found, "the scale", lambda k: float(k.scale)) * (rank + _EPSILON)
    tensors = {m: {"lora_A": k.a.T, "lora_E": k.e[:, None], "lora_B": k.b.T} for m, k in found.items()}
    return tensors, {}, {"init_r": rank, "target_r": rank, "lora_alpha": whole_number(alpha), "rank_pattern": None, "total_step": 1,
                         "tinit": 0, "tfinal": 0, "lora_dropout": 0.0, "init_lora_weights": True}  # fmt: skip


def _reader(kernel, prefix):
    def read(part):
        values, (out, d_in) = part.tensors[f"{prefix}_spectrum"], part.shape
        if part.config.get("wavelet_family", _HAAR[0]) not in _HAAR:
            raise UserError(f"wavelet_family {part.config['wavelet_family']!r} is not supported; supported: {', '.join(_HAAR)}")
        if part.config.get("use_idwt", True) is not True:
            raise UserError(f"use_idwt {part.config['use_idwt']} is not supported; supported: true")
        if len(values) > out * d_in:
            raise UserError(f"{part.module}: {len(values)} coefficients for a matrix of {out}x{d_in}: an adapter for another base")
        seed = part.config["random_loc_seed"]
        return kernel, {"values": values, "places": places_of(seed, d_in, out, len(values)),
                        "scale": np.float32(part.config["scaling"]), "seed": np.uint32(seed)}  # fmt: skip

    return read


def _writer(prefix, **more):
    def write(found):
        seed = same(found, "the seed of the places", lambda k: int(k.seed))
        scale = whole_number(same(found, "the scale", lambda k: float(k.scale)))
        counts = {m: len(k.values) for m, k in found.items()}
        for module, k in found.items():
            if not np.array_equal(k.places, places_of(seed, *k.shape[-2:], counts[module])):
                raise UserError(f"{module}: its places are not those that seed {seed} draws, and PEFT's file holds the seed alone")
        count, others = most_common(counts)
        return {m: {f"{prefix}_spectrum": k.values} for m, k in found.items()}, {}, {
            "n_frequency": count, "n_frequency_pattern": others, "scaling": scale, "random_loc_seed": seed, "init_weights": True, **more,
        }  # fmt: skip

    return write


def _write_c3a(found):
    block, others = most_common({m: k.c.shape[-1] for m, k in found.items()})
    tensors = {m: {"c3a_kernel": k.c} for m, k in found.items()}
    return tensors, {}, {"block_size": block, "block_size_pattern": others, "init_weights": True}


def _read_hra(part):
    return Reflected, {"u": part.tensors["hra_u"]}


def _write_hra(found):
    rank = same(found, "the number of reflections", lambda k: k.u.shape[-1])
    return {m: {"hra_u": k.u} for m, k in found.items()}, {}, {"r": rank, "apply_GS": False, "init_weights": True}


_ROAD = {"road_1": 1, "road_2": 2, "road_4": 4}


def _read_road(part):
    variant, group = part.config["variant"], part.config["group_size"]
    if variant not in _ROAD:
        raise UserError(f"variant {variant!r} is not supported; supported: {', '.join(_ROAD)}")
    if group < 2 or group % 2 or part.shape[0] % group:
        raise UserError(f"{part.module}: group_size {group} does not divide the {part.shape[0]} outputs of a matrix")
    shape = part.shape[0] // group, _ROAD[variant], group // 2
    return Turned, {"angles": part.tensors["road_theta"].reshape(shape), "sizes": part.tensors["road_alpha"].reshape(shape)}


def _write_road(found):
    numbers = same(found, "the variant", lambda k: k.angles.shape[-2])
    group = same(found, "the group", lambda k: 2 * k.angles.shape[-1])
    tensors = {m: {"road_theta": k.angles.reshape(-1), "road_alpha": k.sizes.reshape(-1)} for m, k in found.items()}
    return tensors, {}, {"variant": f"road_{numbers}", "group_size": group, "init_weights": True}


def _read_delora(part):
    t = part.tensors
    return Bounded, {"a": t["delora_A"].T, "b": t["delora_B"].T, "bound": t["delora_lambda"].reshape(()), "norms": t["delora_w_norm"]}


def _write_delora(found):
    rank, others = most_common({m: k.a.shape[-1] for m, k in found.items()})
    tensors = {m: {"delora_A": k.a.T, "delora_B": k.b.T, "delora_lambda": k.bound.reshape(1), "delora_w_norm": k.norms}
               for m, k in found.items()}  # fmt: skip
    return tensors, {}, {"r": rank, "rank_pattern": others, "module_dropout": 0.0, "init_weights": True}


def _read_gralora(part):
    scale = np.float32(part.config["alpha"] / part.config["r"])
    return Granular, {"a": part.tensors["gralora_A"], "b": part.tensors["gralora_B"], "scale": scale}


def _write_gralora(found):
    rank, k = (same(found, what, lambda k, axis=axis: k.a.shape[axis]) for what, axis in (("the rank", -1), ("k", -3)))
    alpha = whole_number(same(found, "the scale", lambda k: float(k.scale)) * rank)
    tensors = {m: {"gralora_A": kernel.a, "gralora_B": kernel.b} for m, kernel in found.items()}
    return tensors, {}, {"r": rank, "alpha": alpha, "gralora_k": k, "hybrid_r": 0, "gralora_dropout": 0.0, "init_weights": True}


def _read_hira(part):
    return Multiplied, {"a": part.tensors["hira_A"].T, "b": part.tensors["hira_B"].T}


def _write_hira(found):
    rank, others = most_common({m: k.a.shape[-1] for m, k in found.items()})
    tensors = {m: {"hira_A": k.a.T, "hira_B": k.b.T} for m, k in found.items()}
    return tensors, {}, {"r": rank, "rank_pattern": others, "hira_dropout": 0.0, "init_weights": True}


def _read_poly(part):
    a, b, logits = (part.tensors[name] for name in _POLY)
    splits, skills, _, rank = a.shape
    if part.config.get("poly_type", "poly") != "poly":
        raise UserError(f"poly_type {part.config['poly_type']!r} is not supported; supported: poly")
    return Skills, {"a": a, "b": b, "logits": logits.reshape(-1, splits, skills), "scale": np.float32(1 / rank)}


def _write_poly(found):
    names = {"r": ("the rank", "a", -1), "n_tasks": ("the number of tasks", "logits", -3), "n_skills": ("the number of skills", "a", -3),
             "n_splits": ("the number of splits", "a", -4)}  # fmt: skip
    config = {field: same(found, what, lambda k, key=key, axis=axis: getattr(k, key).shape[axis])
              for field, (what, key, axis) in names.items()}  # fmt: skip
    tensors = {m: dict(zip(_POLY, (k.a, k.b, k.logits.reshape(len(k.logits), -1)), strict=True)) for m, k in found.items()}
    return tensors, {}, config | {"poly_type": "poly", "init_weights": True}


def _patch_rows(part, table):
    places, rows = part.config["token_indices"], part.tensors["trainable_tokens_delta"]
    if not isinstance(places, list) or not all(isinstance(i, int) and 0 <= i < len(table) for i in places):
        raise UserError(f"token_indices {str(places)[:40]} are not tokens of a vocabulary of {len(table)}")
    if rows.shape != (len(places), table.shape[1]):
        raise UserError(f"{part.module}: {list(rows.shape)} are not the rows of {len(places)} tokens of width {table.shape[1]}")
    out = table.copy()
    out[places] = rows
    return out


def _unpatch_rows(changed):
    ((module, (before, after)),) = changed.items()
    places = np.flatnonzero((before != after).any(1))
    return {module: {"trainable_tokens_delta": after[places]}}, {"token_indices": places.tolist(), "init_weights": True}


def _patch_bias(part, bias):
    if part.tensors["beft_bias"].size != bias.size:
        raise UserError(f"{part.module}: beft_bias {list(part.tensors['beft_bias'].shape)} is not for {bias.size} outputs")
    return bias + part.tensors["beft_bias"].reshape(-1)


def _unpatch_bias(changed):
    return {m: {"beft_bias": (after - before)[None]} for m, (before, after) in changed.items()}, {"init_weights": True}


_POLY = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")
ROWS = (
    Kind("ADALORA", (Triplets,), ("lora_A", "lora_E", "lora_B"), _read_adalora, _write_adalora, ("use_dora", "lora_bias"),
         numbers=("lora_alpha", "init_r")),
    Kind("FOURIERFT", (Frequencies,), ("fourierft_spectrum",), _reader(Frequencies, "fourierft"), _writer("fourierft"),
         numbers=("scaling", "random_loc_seed")),
    Kind("WAVEFT", (Wavelets,), ("waveft_spectrum",), _reader(Wavelets, "waveft"),
         _writer("waveft", wavelet_family=_HAAR[0], use_idwt=True, proportional_parameters=False),
         numbers=("scaling", "random_loc_seed")),
    Kind("C3A", (Circulant,), ("c3a_kernel",), lambda part: (Circulant, {"c": part.tensors["c3a_kernel"]}), _write_c3a,
         fixed=("bias",)),
    Kind("HRA", (Reflected,), ("hra_u",), _read_hra, _write_hra, ("apply_GS",), fixed=("bias",)),
    Kind("ROAD", (Turned,), ("road_theta", "road_alpha"), _read_road, _write_road, numbers=("group_size",), fixed=()),
    Kind("DELORA", (Bounded,), ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), _read_delora, _write_delora,
         fixed=("bias",)),
    Kind("GRALORA", (Granular,), ("gralora_A", "gralora_B"), _read_gralora, _write_gralora, ("hybrid_r",),
         numbers=("alpha", "r")),
    Kind("POLY", (Skills, SkillRouter), _POLY, _read_poly, _write_poly, fixed=()),
    Kind("TRAINABLE_TOKENS", (), ("trainable_tokens_delta",), None, None, fixed=(),
         holds=lambda name: name.endswith(("embed_tokens.weight", "word_embeddings.weight")), patch=_patch_rows, unpatch=_unpatch_rows),
    Kind("BEFT", (), ("beft_bias",), None, None, fixed=(), holds=lambda name: name.endswith(".bias") and not is_norm(name),
         leaf="bias", patch=_patch_bias, unpatch=_unpatch_bias),
    Kind("HIRA", (Multiplied,), ("hira_A", "hira_B"), _read_hira, _write_hira, fixed=("fan_in_fan_out",)),
)  # fmt: skip
