"""LoRA adapters in PEFT's format, out of and into a tree with ``LowRank`` kernels."""

import collections
import pathlib
import re
import typing

import jax.numpy as jnp
import numpy as np

from ft_jax import tree
from ft_jax.errors import UserError, nearest
from ft_jax.io import files, hf, layout, safetensors
from ft_jax.kernels import LowRank, is_kernel

ROOT = "base_model.model."
TASKS = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS", "none": "FEATURE_EXTRACTION", "pooled": "FEATURE_EXTRACTION",
         "prototype": "FEATURE_EXTRACTION"}  # fmt: skip
# Fields that change the maths of an adapter in ways LowRank does not have.
UNSUPPORTED = (
    "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "velora_config", "monteclora_config", "arrow_config",
    "kasa_config", "megatron_config",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that also move the frozen weights
MERGED = "export the merged model instead"


def save_adapter(folder, model, params, base_name, *, base=None, use_rslora=False):
    """Writes adapter_config.json and adapter_model.safetensors; lora_A is ``[r, in]``, lora_B ``[out, r]``.

    base_name: what ``base_model_name_or_path`` says. base: the plain base parameters; other leaves that differ from
    them (classification and prototype heads always) are stored whole, as ``modules_to_save``.
    UserError for what PEFT has no place for: taps, other or nested kernels, a moved base under an adapter, MLM heads.
    """
    lora, whole = _collect(model.config, params, None if base is None else tree.flatten(base))
    if not lora:
        raise UserError(f"the parameters hold no LoRA kernel, so there is no adapter to write; {MERGED}")
    saved = sorted({_module_to_save(name) for name in whole} - {"prototype"})
    for module in saved:
        if any(m == module or m.startswith(module + ".") for m in lora):
            raise UserError(f"{module} has an adapter and is trained itself, which PEFT cannot hold; {MERGED}")
    power = 0.5 if use_rslora else 1.0
    ranks = {module: a.shape[0] for module, (a, _, _) in lora.items()}
    alphas = {module: _round(scale * ranks[module] ** power) for module, (_, _, scale) in lora.items()}
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA", "task_type": TASKS.get(model.config.head), "base_model_name_or_path": base_name,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": use_rslora,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "target_modules": sorted(lora), "modules_to_save": saved or None,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
    }  # fmt: skip
    tensors = {}
    for module, (a, b, _) in lora.items():
        tensors |= {f"{ROOT}{module}.lora_A.weight": a, f"{ROOT}{module}.lora_B.weight": b}
    tensors |= {ROOT + name: array for name, array in whole.items()}
    folder = files.make_folder(folder)
    with files.replacing(folder / "adapter_config.json") as temporary:
        files.write_json(temporary, config)
        safetensors.save(folder, sorted(tensors.items()), stem="adapter_model")


def _collect(config, params, base):
    """``({module: (A, B, scale)}, {checkpoint name: array})`` in the checkpoint's orientation."""
    rows = {(row.path, row.layer): row for row in layout.tensors(config)}
    lora, whole = {}, {}
    for path, parts in hf.stack_parts(tree.flatten(params, is_leaf=is_kernel)).items():
        stacked = path.startswith("layers/")
        if (path, 0 if stacked else None) not in rows:
            raise UserError(f"{path}: a PEFT adapter has no place for it{nearest(path, [p for p, _ in rows])}")
        for first, leaf in parts:
            layers = range(first, first + leaf.shape[0]) if stacked else (None,)
            before = None if base is None else base[path][first : first + len(layers)] if stacked else base[path]
            names = [layout.saved_name(config, rows[path, i].name) for i in layers]
            if is_kernel(leaf):
                lora |= dict(zip((n.removesuffix(".weight") for n in names), _factors(path, leaf, before, stacked)))
            elif _travels(config, path, leaf, before):
                arrays = np.asarray(leaf, np.float32) if stacked else np.asarray(leaf, np.float32)[None]
                transposed = path.endswith("/kernel")
                whole |= {n: x.T if transposed else x for n, x in zip(names, arrays, strict=True)}
    return lora, whole


def _travels(config, path, leaf, before):
    if config.head in ("classification", "prototype") and path.startswith(hf.HEAD_LEAVES[config.head]):
        return True
    changed = before is not None and not np.array_equal(np.asarray(leaf), np.asarray(before))
    if changed and path.startswith("mlm/"):
        raise UserError(f"{path} was trained, and PEFT cannot hold an MLM head; {MERGED}")
    return changed


def _factors(path, leaf, before, stacked):
    if not isinstance(leaf, LowRank) or is_kernel(leaf.base):
        kind = type(leaf).__name__
        kind += f" around {type(leaf.base).__name__}" if hasattr(leaf, "base") else ""
        raise UserError(f"{path}: a {kind} kernel has no form in PEFT; {MERGED}")
    if path.startswith("head/"):
        raise UserError(f"{path}: PEFT trains heads whole and takes no adapter on them; {MERGED}")
    if before is not None and not np.array_equal(np.asarray(leaf.base), np.asarray(before)):
        raise UserError(f"{path}: the frozen matrix under the adapter is not that of the base model; {MERGED}")
    a, b, scale = (np.asarray(x, np.float32) for x in (leaf.a, leaf.b, leaf.scale))
    if not stacked:
        a, b, scale = a[None], b[None], scale[None]
    return [(x.T, y.T, float(s)) for x, y, s in zip(a, b, scale, strict=True)]


def _module_to_save(name):
    # PEFT always takes a classifier as one module, however many layers it has.
    return "classifier" if name.startswith("classifier.") else name.rpartition(".")[0]


def _round(alpha):
    """The whole number a float32 product stands for, where it does."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-5 * max(1.0, abs(alpha)) else alpha


class Adapter(typing.NamedTuple):
    """A PEFT LoRA adapter by the checkpoint names of its base: ``{module: {"A" or "B": key}}``, ``{tensor: key}``."""

    folder: pathlib.Path
    config: dict
    checkpoint: safetensors.Checkpoint
    factors: dict
    whole: dict


def open_adapter(folder):
    """The ``Adapter`` of a folder, no tensor read; UserError for a kind that is not LoRA as `LowRank` has it."""
    folder = pathlib.Path(folder)
    config = files.read_json(folder / "adapter_config.json")
    _check_config(folder, config)
    # Named in full: the folder may hold a merged model beside the adapter.
    checkpoint = safetensors.Checkpoint(folder / "adapter_model.safetensors")
    factors, whole = collections.defaultdict(dict), {}
    for key in checkpoint.names:
        name = key.removeprefix(ROOT).replace(".modules_to_save.", ".").replace(".default.", ".")
        found = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name)
        if found:
            factors[found[1]][found[2]] = key
        else:
            whole[name] = key
    if not factors:
        raise UserError(f"{checkpoint.path}: holds no LoRA tensors")
    return Adapter(folder, config, checkpoint, dict(factors), whole)


def load_adapter(folder, model, params):
    """``params`` with the adapter's ``LowRank`` kernels around their matrices, and its whole modules in place.

    Layers that the adapter leaves out get a zero one; smaller ranks are filled up with zeros. UserError, naming the
    field, module or shape, for an adapter of another kind or of another base.
    """
    adapter = open_adapter(folder)
    checkpoint, rows, adapters, whole = adapter.checkpoint, _rows_by_name(model.config), {}, {}

    def row_of(name, key):
        if name not in rows:
            ours, module = f"this {model.config.family} model with head {model.config.head!r}", name.removesuffix(".weight")
            known = [n.removesuffix(".weight") for n in rows]
            raise UserError(f"{checkpoint.path}: {key}: {ours} has no module {module!r}{nearest(module, known)}")
        return rows[name]

    for module, keys in adapter.factors.items():
        row = row_of(module + ".weight", next(iter(keys.values())))
        a, b, scale = read_factors(adapter, module, row.shape)
        adapters[row] = a.T, b.T, scale
    for name, key in adapter.whole.items():
        whole[row_of(name, key)] = checkpoint.read(key)
    for row, array in whole.items():
        if array.shape != row.shape:
            raise UserError(
                f"{checkpoint.path}: {row.name} is {list(array.shape)} but the model's is "
                f"{list(row.shape)}: an adapter for another base or another number of labels"
            )
    return _apply(model.config, params, adapters, whole)


def _check_config(folder, config):
    file = folder / "adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type {config.get('peft_type')!r} is not supported; supported: LORA")
    for field in UNSUPPORTED:
        if config.get(field):
            raise UserError(f"{file}: {field} {str(config[field])[:40]} is not supported")
    if config.get("bias", "none") != "none":
        raise UserError(f"{file}: bias {config['bias']!r} is not supported; supported: none")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: init_lora_weights {start!r} moves the base weights, which the adapter does not hold; "
            "convert it to plain LoRA with PEFT first"
        )
    for field in ("lora_alpha", "rank_pattern", "alpha_pattern"):
        value, kinds = config.get(field), (int, float) if field == "lora_alpha" else (dict, type(None))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{file}: {field} is {value!r}")


def _rows_by_name(config):
    rows = {row.name: row for row in layout.tensors(config)}
    return {name.removeprefix(layout.prefix(config)): row for name, row in rows.items()} | rows


def check_factors(adapter, module, shape):
    """UserError, from the headers alone, unless a module's A and B make a change of a matrix stored as ``shape``."""
    where, keys = adapter.checkpoint.path, adapter.factors[module]
    if len(keys) < 2:
        raise UserError(f"{where}: {module} lacks lora_{'B' if 'A' in keys else 'A'}")
    a, b = (adapter.checkpoint.shape(keys[part]) for part in "AB")
    if len(shape) != 2 or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise UserError(f"{where}: {module}: lora_A {list(a)} and lora_B {list(b)} make no adapter")
    if (b[0], a[1]) != tuple(shape):
        raise UserError(f"{where}: {module} is for a matrix of {b[0]}x{a[1]}, the model's is {shape[0]}x{shape[1]}: "
                        "an adapter for another base")


def read_factors(adapter, module, shape):
    """``(A [r, in], B [out, r], scale)`` of one module, float32: its change of a matrix stored as ``shape`` is scale · B A."""
    check_factors(adapter, module, shape)
    a, b = (adapter.checkpoint.read(adapter.factors[module][part]) for part in "AB")
    return a, b, _scale(adapter, module, a.shape[0])


def _scale(adapter, module, rank):
    alpha = adapter.config["lora_alpha"]
    for pattern, value in (adapter.config.get("alpha_pattern") or {}).items():
        try:
            hit = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            file = adapter.checkpoint.path
            raise UserError(f"{file}: alpha_pattern {pattern!r} is not a regular expression: {error}") from None
        if hit:
            alpha = value
            break
    return alpha / rank ** (0.5 if adapter.config.get("use_rslora") else 1.0)


def _apply(config, params, adapters, whole):
    flat = tree.flatten(params, is_leaf=is_kernel)
    depth = config.num_layers - next((w.shape[0] for p, w in flat.items() if p.startswith("layers/")), 0)

    def place(row):
        if row.layer is None:
            return row.path, None
        if row.layer < depth:
            return "frozen_" + row.path, row.layer
        return row.path, row.layer - depth

    for row, array in whole.items():
        path, i = place(row)
        if is_kernel(flat[path]):
            raise UserError(f"{path}: the adapter replaces it whole, but it already carries a kernel; load it first")
        array = jnp.asarray(array.T if row.transposed else array)
        flat[path] = array if i is None else flat[path].at[i].set(array)
    grouped = collections.defaultdict(dict)
    for row, adapter in adapters.items():
        path, i = place(row)
        grouped[path][i] = adapter
    for path, found in grouped.items():
        flat[path] = _low_rank(flat[path], found)
    return tree.nest(flat)


def _low_rank(leaf, found):
    *stack, d_in, d_out = leaf.shape
    rank = max(a.shape[1] for a, _, _ in found.values())
    a, b = np.zeros((*stack, d_in, rank), np.float32), np.zeros((*stack, rank, d_out), np.float32)
    scale = np.zeros(stack, np.float32)
    for i, (x, y, s) in found.items():
        where = () if i is None else (i,)
        a[(*where, slice(None), slice(x.shape[1]))] = x
        b[(*where, slice(y.shape[0]))] = y
        scale[where] = s
    return LowRank(leaf, jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale))
