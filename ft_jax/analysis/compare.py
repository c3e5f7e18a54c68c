"""The spectral report of any two Hugging Face checkpoints of one architecture, one matrix pair in memory at a time."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections import Counter

import numpy as np
import tqdm

from ft_jax.analysis import certify, change, spectral, topk
from ft_jax.errors import UserError, nearest
from ft_jax.io import files
from ft_jax.io.adapted import Adapted
from ft_jax.io.safetensors import READABLE, Checkpoint
from ft_jax.kernels import LowRank

# Embeddings and heads: what maps ids to vectors and vectors to answers is no part of the published count.
EXCLUDE = (r"(^|\.)((\w+_)?embeddings?|embed_\w+|wte|wpe|shared|relative_attention_bias|pooler|cls|classifier|"
           r"pre_classifier|prototype|classification_head|lm_head|score|qa_outputs|heads?|vocab_\w+|\w+_predictions)(\.|$)")
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # these store matrices [in, out]
ENGINES = ("auto", "exact", "fast", "certified")
CACHED_SIDE = 2048  # largest smaller side whose base is factorised in full, once, when the engine is left to choose
_REOPEN = 64 << 20  # bytes read through a memory map before it is dropped, pages and all


@dataclasses.dataclass(frozen=True)
class Pair:
    """One tensor of both checkpoints; ``in_out`` says that it is stored ``[…, in, out]``."""

    name: str
    base_name: str
    shape: tuple[int, ...]
    in_out: bool


def natural(name):
    """Sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def place(name):
    """``(layer or None, kind)``: ``encoder.layer.3.output.dense.weight`` -> ``(3, "output.dense")``."""
    parts = re.sub(r"(\.weight)?(\[\d+\])?$", "", name).split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return None, ".".join(parts)
    return int(parts[at]), ".".join("*" if part.isdigit() else part for part in parts[at + 1:])


def _aligned(base, tuned):
    """``{tuned name: base name}`` under the wrapper prefix, on either side, that makes most names meet."""
    prefixes = {""}
    for name in (*base, *tuned):
        parts = name.split(".")
        prefixes.update(".".join(parts[:i]) + "." for i in (1, 2) if len(parts) > i)
    held = set(base)

    def meet(strip, add):
        return {n: add + n[len(strip):] for n in tuned if n.startswith(strip) and add + n[len(strip):] in held}

    options = [meet(prefix, "") for prefix in sorted(prefixes)] + [meet("", prefix) for prefix in sorted(prefixes)]
    return max(options, key=len)  # the first of the longest: the empty prefix where names are equal


def opened(source):
    """Reader of a checkpoint folder or file, or of an `Adapted` one."""
    return source.checkpoint() if isinstance(source, Adapted) else Checkpoint(source)


def _regex(pattern, what):
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"--{what}={pattern!r} is not a regular expression: {error}") from None


def _model_type(base, tuned):
    kinds = {}
    for folder in (base, tuned):
        folder = pathlib.Path(folder.base if isinstance(folder, Adapted) else folder)
        config = files.read_json((folder if folder.is_dir() else folder.parent) / "config.json")
        text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
        hidden = config.get("hidden_size") or text.get("hidden_size")
        kinds[folder] = (config.get("model_type"), hidden)
    (first, (kind, hidden)), *_ = kinds.items()
    for folder, (other, _) in kinds.items():
        if other != kind:
            raise UserError(f"different architectures: model_type is {kind!r} in {first}/config.json and "
                            f"{other!r} in {folder}/config.json")
    return kind, hidden


def _stored_in_out(name, shape, kind, hidden):
    """Whether a tensor is ``[…, in, out]``; None where stacked experts leave it open."""
    if len(shape) == 2:
        return kind in CONV1D
    out_in = (shape[1] if "down" in name else shape[2]) == hidden
    in_out = (shape[2] if "down" in name else shape[1]) == hidden
    return None if out_in == in_out else in_out


def _why_not(name, shape, include, exclude):
    matrix = len(shape) == 2 or (len(shape) == 3 and "experts" in name.split("."))
    if not matrix or min(shape) < 2:
        return "not a matrix"
    if exclude is not None and exclude.search(name):
        return "embedding or head" if exclude.pattern == EXCLUDE else "excluded"
    if include is not None and not include.search(name):
        return "not included"
    return None


def plan(base, tuned, include=None, exclude=EXCLUDE):
    """``([Pair], {name: why skipped})`` of two checkpoint folders, from their headers alone; tuned may be `Adapted`.

    ``include`` and ``exclude`` are regexes searched for in names. UserError names the tensor that is missing, has
    another shape or an unreadable kind, before anything is computed.
    """
    kind, hidden = _model_type(base, tuned)
    first, second = opened(base), opened(tuned)
    include = _regex(include, "include") if include else None
    exclude = _regex(exclude, "exclude") if exclude else None
    partner = _aligned(first.names, second.names)
    skipped, pairs = {}, []
    for name in sorted(second.names, key=natural):
        shape = second.shape(name)
        why = _why_not(name, shape, include, exclude)
        if why:
            skipped[name] = why
            continue
        if name not in partner:
            raise UserError(f"{base}: no tensor {name!r}, which {tuned} has{nearest(name, first.names)}")
        other = first.shape(partner[name])
        if other != shape:
            raise UserError(f"{name}: shape {list(other)} in {base} but {list(shape)} in {tuned}")
        for checkpoint, held in ((first, partner[name]), (second, name)):
            if checkpoint.dtype(held) not in READABLE:
                raise UserError(f"{checkpoint.path}: {held} is {checkpoint.dtype(held)}; "
                                f"read are {', '.join(READABLE)}")
        in_out = _stored_in_out(name, shape, kind, hidden)
        if in_out is None:
            skipped[name] = "stacked experts whose orientation hidden_size does not tell"
        else:
            pairs.append(Pair(name, partner[name], shape, in_out))
    matched = set(partner.values())
    for name in first.names:
        if name not in matched and not _why_not(name, first.shape(name), include, exclude):
            raise UserError(f"{tuned}: no tensor {name!r}, which {base} has{nearest(name, second.names)}")
    if not pairs:
        raise UserError(f"{tuned}: no matrix is left to compare{nearest(include.pattern if include else '', skipped)}")
    return pairs, skipped


def identity(path):
    """SHA-256 over names, sizes, times and 64 samples of every safetensors file: changes when a checkpoint does."""
    if isinstance(path, Adapted):
        return " ".join((identity(path.base), identity(path.folder), path.config_digest()))
    path = pathlib.Path(path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        with open(file, "rb") as handle:
            for i in range(64):
                handle.seek(i * stat.st_size // 64)
                digest.update(handle.read(4096))
    return digest.hexdigest()


def _kept(path, header):
    """Rows of an earlier run under the same header; a line cut off by a crash ends them."""
    rows = {}
    if not path.is_file():
        return rows
    for i, line in enumerate(path.read_text("utf-8", errors="replace").splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if i == 0 and row != header:
            return {}
        if i:
            rows[row["name"]] = row
    return rows


@dataclasses.dataclass(frozen=True)
class How:
    """How matrices are measured; see `compare`."""

    k: int = 10
    eps: float = 0.5
    engine: str = "exact"
    effective_rank: bool = False

    def of(self, shape):
        """The engine for one matrix."""
        if self.engine == "exact" or min(shape) < topk.MIN_SIDE:
            return "exact"
        if self.engine == "auto":
            return "fast" if min(shape) <= CACHED_SIDE else "certified"
        return self.engine


def _measured(base, tuned, how):
    """The numbers of one ``[in, out]`` matrix, ready for JSON."""
    engine = how.of(base.shape)
    if engine == "exact":
        return {n: x.tolist() for n, x in spectral.spectral(base, tuned, k=how.k).items() if n != "intruders"} | {
            "engine": engine, "fell_back": 0}  # fmt: skip
    exact = True if how.effective_rank else None
    if engine == "fast":
        out = topk.intruders(base, tuned, k=how.k, eps=how.eps, sweep=spectral.EPS_SWEEP)
        ends = {}
        fell = int(out["fell_back"]) * len(out["max_cosine"])
    else:
        out = certify.intruders(base, tuned, k=how.k, eps=how.eps)
        ends = {f"max_cosine_{end}": out[end].tolist() for end in ("lower", "upper")}
        fell = out["fell_back"]
    found = {name: out[name].tolist() for name in ("max_cosine", "singular_values")}
    return found | change.change(base, tuned, exact=exact) | ends | {"engine": engine, "fell_back": fell}


def _rows_of(pair, base, tuned, how):
    """The rows of one tensor: one, or one an expert; base and tuned are arrays or kernels ``[…, in, out]``."""
    stack = len(pair.shape) == 3
    for i in range(pair.shape[0] if stack else 1):
        try:
            one = _measured(*((base[i], tuned[i]) if stack else (base, tuned)), how)
        except UserError as error:
            raise UserError(f"{pair.name}: {error}") from None
        if one["delta_norm_relative"] == float("inf"):
            one["delta_norm_relative"] = None  # the base matrix is zero
        name = f"{pair.name}[{i}]" if stack else pair.name
        layer, kind = place(name)
        same = {} if pair.base_name == pair.name else {"base_name": pair.base_name}
        yield {"name": name, **same, "shape": list(pair.shape[-2:]), "layer": layer, "kind": kind, **one}


def _read(first, second, pair, how):
    """``(base, tuned)`` as ``[…, in, out]``; what an adapter changes comes as W0 + A B unless all is to be exact."""
    flip = (lambda x: x) if pair.in_out else (lambda x: x.swapaxes(-1, -2))
    before = first.read(pair.base_name)
    if pair.name not in getattr(second, "modules", {}) or how.of(pair.shape[-2:]) == "exact":
        return flip(before), flip(second.read(pair.name))
    a, b, scale = second.factors(pair.name)
    left, right = (b, a) if pair.in_out else (a.T, b.T)
    return flip(before), LowRank(flip(before), left, right, np.float32(scale))


def stream(base, tuned, pairs, journal, *, k=10, eps=0.5, engine="exact", effective_rank=False, progress=True):
    """``{name: row}`` of every pair; rows are appended to ``journal`` as they come and taken from it next time.

    Holds one matrix pair and the work arrays of its engine: square float64 ones of the smaller side unless certified.
    The journal is begun anew when a checkpoint or a setting that rows depend on has changed.
    """
    journal, how = pathlib.Path(journal), How(k, eps, engine, effective_rank)
    header = {"version": 2, "k": k, "engine": engine, "effective_rank": effective_rank,
              "base": identity(base), "tuned": identity(tuned)}  # fmt: skip
    if any(how.of(pair.shape[-2:]) != "exact" for pair in pairs):
        header["eps"] = eps  # the others hold for every ε
    rows = _kept(journal, header)
    files.write(journal, "".join(json.dumps(r) + "\n" for r in (header, *rows.values())).encode())
    first, second, mapped = opened(base), opened(tuned), 0
    with open(journal, "a", encoding="utf-8") as log, tqdm.tqdm(
            pairs, desc="spectra", unit="matrix", disable=not progress) as bar:
        for pair in bar:
            names = [f"{pair.name}[{i}]" for i in range(pair.shape[0])] if len(pair.shape) == 3 else [pair.name]
            if all(name in rows for name in names):
                continue
            before, after = _read(first, second, pair, how)
            for row in _rows_of(pair, before, after, how):
                log.write(json.dumps(row, allow_nan=False) + "\n")
                rows[row["name"]] = row
            log.flush()
            mapped += 2 * before.nbytes
            del before, after
            if mapped > _REOPEN:
                first, second, mapped = opened(base), opened(tuned), 0
    return rows


def summarise(base, tuned, rows, skipped, *, k=10, eps=0.5):
    """The report as one JSON object: matrices, totals, and counts for every ε and k of the sweeps.

    Certified rows enclose a cosine: ``undecided`` says how many of them leave a count of the sweep open. None does at
    the ε asked.
    """
    matrices = []
    for row in rows:
        count = int(spectral.count_intruders(row["max_cosine"], k=k, eps=eps))
        at = list(row).index("kind") + 1
        items = list(row.items())
        matrices.append(dict([*items[:at], ("intruders", count), *items[at:]]))

    def total(k, eps, key="max_cosine"):
        return sum(int(spectral.count_intruders(row.get(key, row["max_cosine"]), k=k, eps=eps)) for row in rows)

    def undecided(eps):
        return total(k, eps, "max_cosine_lower") - total(k, eps, "max_cosine_upper")

    return {
        "base": str(base), "tuned": str(tuned), "k": k, "eps": eps,
        "matrices": matrices,
        "total_intruders": total(k, eps),
        "total_directions": sum(len(row["max_cosine"]) for row in rows),
        "engines": dict(Counter(row["engine"] for row in rows)),
        "fell_back": sum(row["fell_back"] for row in rows),
        "eps_sweep": [{"eps": e, "total_intruders": total(k, e), "undecided": undecided(e)}
                      for e in sorted({*spectral.EPS_SWEEP, eps})],
        "k_sweep": [{"k": i, "total_intruders": total(i, eps)} for i in range(1, k + 1)],
        "skipped": [{"name": name, "why": why} for name, why in skipped.items()],
        "skipped_counts": dict(Counter(skipped.values())),
    }  # fmt: skip


def compare(base, tuned, out, *, k=10, eps=0.5, include=None, exclude=EXCLUDE, engine="auto", effective_rank=False,
            progress=True):  # fmt: skip
    """Plans, streams and writes ``spectral.json`` under ``out``, with its journal; returns the report.

    engine: "exact" (`spectral`, full factorisations in float64), "fast" (`topk`, the base factorised once and cached),
    "certified" (`certify`, no full factorisation; counts hold at ``eps``, other ε are enclosed) or "auto": fast up to
    a side of 2048, certified above, exact where matrices are tiny. Counts are the same. Certified and fast rows of
    dense changes over 2048 have no effective rank unless ``effective_rank`` asks for it, by a full factorisation.
    """
    if not 1 <= k <= 1000:
        raise UserError(f"--k={k}: the number of top directions lies between 1 and 1000")
    if not 0 < eps <= 1:
        raise UserError(f"--eps={eps}: a cosine threshold lies in (0, 1]")
    if engine not in ENGINES:
        raise UserError(f"--engine={engine}: no such engine{nearest(engine, ENGINES)}")
    pairs, skipped = plan(base, tuned, include, exclude)
    out = files.make_folder(out)
    rows = stream(base, tuned, pairs, out / "spectral.jsonl", k=k, eps=eps, engine=engine,
                  effective_rank=effective_rank, progress=progress)  # fmt: skip
    names = [n for p in pairs for n in ([p.name] if len(p.shape) == 2 else
                                        [f"{p.name}[{i}]" for i in range(p.shape[0])])]  # fmt: skip
    report = summarise(base, tuned, [rows[name] for name in names], skipped, k=k, eps=eps)
    files.write_json(out / "spectral.json", report)
    return report
