"""Adapters in PEFT's format, out of and into a tree with kernels; `peft_kinds.KINDS` lists what is held."""

import collections
import functools
import operator
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax import tree
from ft_jax.errors import UserError, nearest
from ft_jax.io import files, hf, layout, peft_fields, peft_prompts, peft_stack, safetensors
from ft_jax.io.peft_kinds import KINDS, ON_BIAS
from ft_jax.kernels import LowRank, is_kernel
from ft_jax.kernels.mixture import Routed

ROOT, SHARED = "base_model.model.", "base_model."
TASKS = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS", "none": "FEATURE_EXTRACTION", "pooled": "FEATURE_EXTRACTION",
         "prototype": "FEATURE_EXTRACTION"}  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that also move the frozen weights …
FOLLOWED = ("pissa", "olora")  # … and those that the base alone decides
MERGED = "export the merged model instead"


def save_adapter(folder, model, params, base_name, *, base=None, use_rslora=False):
    """Writes adapter_config.json and adapter_model.safetensors as `peft` does; factors ``[out, in]``, as torch has them.

    base_name: what ``base_model_name_or_path`` says. base: the plain base parameters; other leaves that differ from
    them (classification and prototype heads always) are stored whole, as ``modules_to_save``; norms alone are PEFT's
    LN tuning, rows of the token table alone its trainable tokens, biases of matrices alone its BEFT. LoRA around a moved
    base (PiSSA, OLoRA, CorDA) becomes LoRA of twice the rank around ``base``. UserError for what PEFT has no place for:
    taps but a prompt or a prefix, other or nested kernels, several kinds of kernel, a moved base under an adapter, MLM
    heads, a run that trained other leaves without a kernel.
    """
    soft, params = peft_prompts.taken(params)
    found, whole, before = _collect(model.config, params, None if base is None else tree.flatten(base))
    shared_config = {"task_type": TASKS.get(model.config.head), "base_model_name_or_path": base_name, "inference_mode": True}
    if soft:
        return peft_prompts.save(folder, model.config, soft, params, found, whole, shared_config)
    own_names = set() if found else whole.keys() - _heads(model.config)
    kind = _kind_of(found) if found else _kind_without(own_names)
    targets = sorted(found) or sorted({peft_fields.module_to_save(name) for name in own_names})
    saved = sorted({peft_fields.module_to_save(name) for name in whole.keys() - own_names} - {"prototype"})
    for module in saved:
        if any(m == module or m.startswith(module + ".") for m in found):
            raise UserError(f"{module} has an adapter and is trained itself, which PEFT cannot hold; {MERGED}")
    tensors, shared, own = {}, {}, {}
    if found:
        write = functools.partial(kind.write, use_rslora=use_rslora) if kind.peft_type == "LORA" else kind.write
        tensors, shared, own = write(found)
    elif kind.unpatch:
        tensors, own = kind.unpatch({name.rpartition(".")[0]: (before[name], whole.pop(name)) for name in sorted(own_names)})
    config = shared_config | {"peft_type": kind.peft_type, "target_modules": targets} | ({"modules_to_save": saved} if saved else {})
    config |= {field: peft_fields.FIXED[field] for field in kind.fixed} | own
    held = {f"{SHARED}{name}": array for name, array in shared.items()}
    held |= {f"{ROOT}{m}.{suffix}": array for m, part in tensors.items() for suffix, array in part.items()}
    held |= {ROOT + (name if found else _tuned_norm(name)): array for name, array in whole.items()}
    peft_prompts.write(folder, config, held)


def _heads(config):
    return {layout.saved_name(config, row.name) for row in layout.tensors(config)
            if config.head in ("classification", "prototype") and row.path.startswith(hf.HEAD_LEAVES[config.head])}  # fmt: skip


def _tuned_norm(name):
    module, _, last = name.rpartition(".")
    return f"{module}.ln_tuning_layers.{last}" if peft_fields.is_norm(name) else name


def _kind_without(names):
    """The kind without a kernel that holds changes of all these tensors."""
    for kind in KINDS.values():
        if kind.holds and names and all(map(kind.holds, names)):
            return kind
    raise UserError(f"the parameters hold no LoRA kernel and none of PEFT's others, so there is no adapter to write; {MERGED}")


def _kind_of(found):
    kinds = {m: next(k for k in KINDS.values() if type(kernel) in k.kernels) for m, kernel in found.items()}
    first = next(iter(kinds.values()))
    for module, kind in kinds.items():
        if kind is not first:
            raise UserError(f"{module}: a {kind.peft_type} adapter beside {first.peft_type}; PEFT's file holds one kind; {MERGED}")
    return first


def _collect(config, params, base):
    """``({module: kernel of one matrix, numpy}, {checkpoint name: array}, the same of the base)``, arrays as in the checkpoint."""
    rows = {(row.path, row.layer): row for row in layout.tensors(config)}
    flat = tree.flatten(params, is_leaf=is_kernel)
    found, whole, old = {}, {}, {}
    for path, parts in hf.stack_parts(flat).items():
        stacked = path.startswith("layers/")
        if (path, 0 if stacked else None) not in rows:
            raise UserError(f"{path}: a PEFT adapter has no place for it{nearest(path, [p for p, _ in rows])}")
        for first, leaf in parts:
            layers = range(first, first + leaf.shape[0]) if stacked else (None,)
            before = None if base is None else base[path][first : first + len(layers)] if stacked else base[path]
            names = [layout.saved_name(config, rows[path, i].name) for i in layers]
            if is_kernel(leaf):
                _check_kernel(path, leaf, [p for p, _ in rows])
                if before is not None and not np.array_equal(np.asarray(leaf.base), np.asarray(before)):
                    leaf = _around_base(path, leaf, before)
                for i, name in enumerate(names):
                    one = jax.tree.map(operator.itemgetter(i), leaf) if stacked else leaf
                    found[name.removesuffix(".weight")] = jax.tree.map(np.asarray, one)
            elif _travels(config, path, leaf, before):
                for held, array in ((whole, leaf), (old, before)):
                    arrays = () if array is None else np.asarray(array, np.float32) if stacked else np.asarray(array, np.float32)[None]
                    held |= {n: x.T if path.endswith("/kernel") else x for n, x in zip(names, arrays, strict=False)}
    return found, whole, old


def _travels(config, path, leaf, before):
    if config.head in ("classification", "prototype") and path.startswith(hf.HEAD_LEAVES[config.head]):
        return True
    changed = before is not None and not np.array_equal(np.asarray(leaf), np.asarray(before))
    if changed and path.startswith("mlm/"):
        raise UserError(f"{path} was trained, and PEFT cannot hold an MLM head; {MERGED}")
    return changed


def _around_base(path, leaf, base):
    """R + s A B, where W = R + s A0 B0 is the base, as W + s [A A0] [B −B0]ᵀ; UserError if W − R is of a higher rank."""
    refused = UserError(f"{path}: the frozen matrix under the adapter is not that of the base model; {MERGED}")
    if not isinstance(leaf, LowRank) or not np.asarray(leaf.scale).all():
        raise refused
    u, sizes, v = np.linalg.svd(np.asarray(base, np.float64) - np.asarray(leaf.base, np.float64), full_matrices=False)
    rank = leaf.a.shape[-1]
    if sizes[..., rank:].max(initial=0) > 1e-4 * sizes.max():
        raise refused
    root = np.sqrt(sizes[..., :rank] / np.asarray(leaf.scale)[..., None])
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    a, b = np.concatenate([leaf.a, a], -1), np.concatenate([leaf.b, -b], -2)
    return LowRank(base, a.astype(np.float32), b.astype(np.float32), leaf.scale)


def _check_kernel(path, leaf, paths):
    """UserError for a kernel that PEFT has no form of, or no place for."""
    kind, nested = type(leaf).__name__, is_kernel(getattr(leaf, "base", None))
    if nested or not any(type(leaf) in row.kernels for row in KINDS.values()):
        around = f" around {type(leaf.base).__name__}" if nested else ""
        raise UserError(f"{path}: a {kind}{around} kernel has no form in PEFT; {MERGED}")
    if path.startswith("head/"):
        raise UserError(f"{path}: PEFT trains heads whole and takes no adapter on them; {MERGED}")
    if type(leaf) in ON_BIAS and path.removesuffix("kernel") + "bias" in paths:
        raise UserError(f"{path}: PEFT's {ON_BIAS[type(leaf)][0]} the bias too, this kernel the matrix alone; {MERGED}")


class Adapter(typing.NamedTuple):
    """A PEFT adapter by the checkpoint names of its base: ``{module: {suffix: key}}``, ``{tensor: key}``, shared ``{name: key}``."""

    folder: pathlib.Path
    config: dict
    checkpoint: safetensors.Checkpoint
    kind: peft_fields.Kind
    parts: dict
    whole: dict
    shared: dict

    @property
    def factors(self):
        """Of plain LoRA: ``{module: {"A" or "B": key}}``."""
        return {m: {suffix[5]: key for suffix, key in part.items()} for m, part in self.parts.items()}


def open_adapter(folder, plain=False):
    """The ``Adapter`` of a folder, no tensor read; UserError for a kind that is not held, or with ``plain`` for all but LoRA."""
    folder = pathlib.Path(folder)
    config = files.read_json(folder / "adapter_config.json")
    kind = _check_config(folder, config, plain)
    # Named in full: the folder may hold a merged model beside the adapter.
    checkpoint = safetensors.Checkpoint(folder / "adapter_model.safetensors")
    parts, whole, shared = collections.defaultdict(dict), {}, {}
    suffixes = [s.removesuffix("?") for s in kind.tensors]
    for key in checkpoint.names:
        name = key.removeprefix(ROOT).removeprefix(SHARED).replace(".modules_to_save.", ".").replace(".default.", ".")
        suffix = next((s for s in suffixes if name.endswith("." + s)), None)
        if key.removeprefix(SHARED) in kind.shared:
            shared[key.removeprefix(SHARED)] = key
        elif suffix:
            parts[name.removesuffix("." + suffix)][suffix] = key
        elif name.rpartition(".")[2] not in kind.shared:  # PEFT also puts a copy into every module
            whole[name.replace(".ln_tuning_layers.", ".")] = key
    if not parts and kind.tensors:
        raise UserError(f"{checkpoint.path}: holds no {'LoRA' if kind.peft_type == 'LORA' else kind.peft_type} tensors")
    for name in kind.shared:
        if name not in shared:
            drawn = ", which PEFT then draws from torch's random numbers; save it with save_projection=True" * bool(kind.tensors)
            raise UserError(f"{checkpoint.path}: lacks {name}{drawn}")
    return Adapter(folder, config, checkpoint, kind, dict(parts), whole, shared)


def load_adapter(folder, model, params):
    """``params`` with the adapter's kernels around their matrices, and its whole modules in place.

    Layers that the adapter leaves out get one that changes nothing; smaller ranks are filled up with zeros. The biases of
    modules whose outputs (IA)³ scales are scaled, those that RoAd turns are turned, GLoRA's are changed as its tensors say,
    as PEFT does. UserError, naming the field, module or shape, for an adapter of another kind or of another base.
    """
    adapter = open_adapter(folder)
    checkpoint, kind, rows, found, whole = adapter.checkpoint, adapter.kind, _rows_by_name(model.config), {}, {}
    shared = {name: checkpoint.read(key) for name, key in adapter.shared.items()}

    def row_of(name, key):
        if name not in rows:
            ours, module = f"this {model.config.family} model with head {model.config.head!r}", name.removesuffix(".weight")
            known = [n.removesuffix(".weight") for n in rows]
            raise UserError(f"{checkpoint.path}: {key}: {ours} has no module {module!r}{nearest(module, known)}")
        return rows[name]

    for module, keys in adapter.parts.items():
        row = row_of(f"{module}.{kind.leaf}", next(iter(keys.values())))
        if kind.patch:
            read = {suffix: checkpoint.read(key) for suffix, key in keys.items()}
            part = peft_fields.Part(module, row.shape, read, adapter.config, shared)
            whole[row] = functools.partial(_told, adapter, kind.patch, part)
        else:
            part = _part(adapter, module, row.shape, shared, functools.partial(peft_stack.matrix, model.config, params, row))
            found[row] = _read_part(adapter, part)
            if kind.on_bias and f"{module}.bias" in rows:
                whole[rows[f"{module}.bias"]] = functools.partial(_told, adapter, kind.on_bias, part)
    for name, key in adapter.whole.items():
        whole[row_of(name, key)] = checkpoint.read(key)
    for row, array in whole.items():
        if not callable(array) and array.shape != row.shape:
            raise UserError(
                f"{checkpoint.path}: {row.name} is {list(array.shape)} but the model's is "
                f"{list(row.shape)}: an adapter for another base or another number of labels"
            )
    params = peft_stack.apply(model.config, params, found, whole, _start(adapter.config))
    if adapter.kind.peft_type in peft_prompts.TYPES:
        return peft_prompts.attached(model, params, adapter.config, shared[peft_prompts.TENSOR], checkpoint.path)
    return params


def _check_config(folder, config, plain):
    """The `Kind`; UserError for a field that the kernels cannot honour, naming it."""
    file, name = folder / "adapter_config.json", config.get("peft_type")
    held = ["LORA"] if plain else list(KINDS)
    if name not in held:
        raise UserError(f"{file}: peft_type {name!r} is not supported{' here' if plain else ''}; supported: {', '.join(held)}")
    kind = KINDS[name]
    for field in (*kind.unsupported, *(("use_dora",) if plain else ())):
        if config.get(field):
            raise UserError(f"{file}: {field} {str(config[field])[:40]} is not supported")
    for field, value in peft_fields.FIXED.items():
        if config.get(field, value) not in (value, None):
            raise UserError(f"{file}: {field} {config[field]!r} is not supported; supported: {str(value).lower()}")
    start = _start(config)
    if start and (plain or start not in FOLLOWED):
        raise UserError(
            f"{file}: init_lora_weights {config['init_lora_weights']!r} moves the base weights, which the adapter does not hold; "
            "convert it to plain LoRA with PEFT first"
        )
    for field in (*kind.numbers, "rank_pattern", "alpha_pattern"):
        value, kinds = config.get(field), (int, float) if field in kind.numbers else (dict, type(None))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{file}: {field} is {value!r}")
    return kind


def _start(config):
    """How the base was moved when the adapter was made, or ""."""
    start = config.get("init_lora_weights")
    return start.lower() if isinstance(start, str) and start.lower().startswith(CHANGES_BASE) else ""


def _rows_by_name(config):
    rows = {row.name: row for row in layout.tensors(config)}
    return {name.removeprefix(layout.prefix(config)): row for name, row in rows.items()} | rows


def check_factors(adapter, module, shape):
    """UserError, from the headers alone, unless a module's LoRA factors make a change of a matrix stored as ``shape``."""
    where, keys = adapter.checkpoint.path, adapter.parts[module]
    for part in ("lora_A.weight", "lora_B.weight"):
        if part not in keys:
            raise UserError(f"{where}: {module} lacks {part}")
    a, b = (adapter.checkpoint.shape(keys[f"lora_{part}.weight"]) for part in "AB")
    if len(shape) != 2 or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise UserError(f"{where}: {module}: lora_A {list(a)} and lora_B {list(b)} make no adapter")
    if (b[0], a[1]) != tuple(shape):
        raise UserError(f"{where}: {module} is for a matrix of {b[0]}x{a[1]}, the model's is {shape[0]}x{shape[1]}: "
                        "an adapter for another base")


def read_factors(adapter, module, shape):
    """``(A [r, in], B [out, r], scale)`` of one LoRA module, float32: its change of a matrix stored as ``shape`` is scale · B A."""
    check_factors(adapter, module, shape)
    a, b = (adapter.checkpoint.read(adapter.parts[module][f"lora_{part}.weight"]) for part in "AB")
    return a, b, float(_told(adapter, peft_fields.scale_of, adapter.config, module, a.shape[0]))


def _told(adapter, fn, *args):
    """``fn(*args)``, its UserErrors led by the adapter's file."""
    try:
        return fn(*args)
    except UserError as error:
        raise UserError(f"{adapter.checkpoint.path}: {error}") from None


def _part(adapter, module, shape, shared, base):
    """One module's `Part`, its tensors read; UserError for one that is missing."""
    where, keys = adapter.checkpoint.path, adapter.parts[module]
    if adapter.kind.peft_type == "LORA":
        check_factors(adapter, module, shape)
    for suffix in adapter.kind.tensors:
        if not suffix.endswith("?") and suffix not in keys:
            raise UserError(f"{where}: {module} lacks {suffix}")
    read = {s: getattr(adapter.checkpoint, "integers" if s.endswith("_indices") else "read")(key) for s, key in keys.items()}
    return peft_fields.Part(module, tuple(shape), read, adapter.config, shared, base)


def _read_part(adapter, part):
    """``(kernel class, fields)`` of one module."""
    try:
        kernel, fields = _told(adapter, adapter.kind.read, part)
        base = jax.ShapeDtypeStruct(part.shape[::-1], jnp.float32)
        one = {"tasks": jnp.zeros((), jnp.int32)} if issubclass(kernel, Routed) else {}  # else it is no matrix
        made = jax.eval_shape(lambda w, f: kernel(w, **f, **one).dense(), base, fields).shape
    except (TypeError, ValueError) as error:
        made = f"no matrix ({str(error).splitlines()[0][:80]})"
    if made != part.shape[::-1]:
        sizes = ", ".join(f"{s} {list(x.shape)}" for s, x in part.tensors.items())
        raise UserError(f"{adapter.checkpoint.path}: {part.module}: {sizes} do not fit the model's matrix of "
                        f"{'x'.join(map(str, part.shape))}: an adapter for another base")
    return kernel, fields
