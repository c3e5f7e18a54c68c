"""What a compiled program does, read from its text: bytes that travel between devices, bytes of memory that it moves.

XLA's own ``cost_analysis`` counts the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import math
import re

import numpy as np

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
         "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What moves no bytes: names, views, and calls whose insides are counted by themselves.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "iota", "partition-id",
        "replica-id", "after-all", "add-dependency", "opt-barrier", "custom-call", "broadcast"}  # fmt: skip

_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*->.*\{\s*$")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))")


@dataclasses.dataclass
class Instruction:
    name: str
    shape: str
    op: str
    rest: str  # operands and attributes
    root: bool

    @property
    def operands(self):
        depth, text = 1, ""
        for c in self.rest:
            depth += (c == "(") - (c == ")")
            if not depth:
                break
            text += c
        return re.findall(r"%([\w.\-]+)", text)

    @property
    def calls(self):
        return [name.strip().lstrip("%") for group in _CALLS.findall(self.rest) for name in "".join(group).split(",")]


def sizes(shape, main=False):
    """Bytes of each array in a shape's text: a tuple has several. main: only those in the main memory, not on the chip itself."""
    return [math.prod(map(int, filter(None, dims.split(",")))) * SIZES[kind] for kind, dims, layout in _SHAPE.findall(shape)
            if kind in SIZES and not (main and "S(" in layout)]  # fmt: skip


def parse(text):
    """``({computation: [Instruction]}, name of the entry)`` of a module's text."""
    out, entry, here = {}, None, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = out.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        elif here is not None and (found := _LINE.match(line)):
            here.append(Instruction(*found.groups(), root=line.lstrip().startswith("ROOT")))
    return out, entry


def _trips(one, computations):
    """How often a loop runs: as XLA says, else N of its condition ``i < N`` (scans count up from 0), else once."""
    if said := re.search(r"known_trip_count[^\d]*(\d+)", one.rest):
        return int(said[1])
    condition = {inner.name: inner for inner in computations[re.search(r"condition=%?([\w.\-]+)", one.rest)[1]]}
    test = next(inner for inner in condition.values() if inner.root)
    if test.op == "compare" and "direction=LT" in test.rest:
        bounds = [condition[name] for name in test.operands if condition[name].op == "constant"]
        return int(re.match(r"\d+", bounds[0].rest)[0]) if bounds else 1
    return 1


def runs(computations, entry):
    """``{computation: how often it runs}``."""
    times = dict.fromkeys(computations, 0)

    def visit(name, count):
        times[name] += count
        for one in computations[name]:
            trips = _trips(one, computations) if one.op == "while" else 1
            for called in one.calls:
                if called in computations:
                    visit(called, count * trips)

    visit(entry, 1)
    return times


def groups(rest):
    """int [groups, size]: which partitions take part together in a collective, or None where all do."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:,\s*device_ids=\(([^)]*)\)\s*)?\{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        taken = re.findall(r"'([^']+)'", found[3])
        ids = np.arange(math.prod(axes.values())).reshape(list(axes.values()))
        return np.moveaxis(ids, [list(axes).index(a) for a in taken], range(-len(taken), 0)).reshape(-1, math.prod(axes[a] for a in taken))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, dims = ([int(n) for n in found[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if found[3]:
            ids = ids.transpose([int(n) for n in found[3].split(",")])
        return ids.reshape(shape)
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}", rest):
        return np.asarray([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,\s]+)\}", found[1])])
    return None


def traffic(one, size):
    """Bytes that each of ``size`` devices sends in a collective, by the ring algorithm."""
    largest, share = max(sizes(one.shape), default=0), (size - 1) / size
    kind = one.op.removesuffix("-start")
    if kind == "reduce-scatter":  # its result is the share that stays
        return sum(sizes(one.shape)) * (size - 1) if one.op == kind else largest * share
    if kind == "collective-permute":
        return largest
    whole = largest if one.op != kind else sum(sizes(one.shape))
    return whole * share * (2 if kind == "all-reduce" else 1)


def _add(rows, op, across, count, size):
    row = rows.setdefault((op, across), {"op": op, "across": across, "bytes": 0.0, "count": 0})
    row["bytes"] += count * size
    row["count"] += count


def collectives(text, slice_of=None):
    """Rows ``{op, bytes, count, across}`` of what each device sends in a run, gathered by op and by ``across``.

    slice_of: slice of each partition; ``across`` says whether a group has devices of several slices.
    """
    computations, entry = parse(text)
    times, rows, told = runs(computations, entry), {}, set()
    for name, instructions in computations.items():
        for one in instructions:
            kind, channel = one.op.removesuffix("-start"), re.search(r"channel_id=(\d+)", one.rest)
            sent = re.search(r'megascale_transfer_type="(\w+)"', one.rest)
            if one.op == "send" and sent:  # a TPU's way between slices: through the hosts
                kind, count = sent[1].lower().replace("_", "-"), len(set(slice_of or ())) or 2
                size = sizes(one.shape)[0] * (count - 1) / count * (2 if kind == "all-reduce" else 1)
                _add(rows, kind, True, times[name], size)
                continue
            if kind not in COLLECTIVES or not times[name] or (channel and (kind, channel[1]) in told):
                continue  # one that runs beside other work stands in several fusions, under one channel
            told |= {(kind, channel[1])} if channel else set()
            found = groups(one.rest)
            pairs = kind == "collective-permute"
            size = 2 if pairs or found is None else found.shape[1]
            across = slice_of is not None and found is not None and bool((np.ptp(np.asarray(slice_of)[found], axis=1) > 0).any())
            _add(rows, kind, across, times[name], traffic(one, size))
    return sorted(rows.values(), key=lambda r: -r["bytes"])


def moved(text):
    """Bytes that the program reads and writes in a device's memory: results and operands of all that is not fused away."""
    computations, entry = parse(text)
    times, total = runs(computations, entry), 0.0
    inner = {name for instructions in computations.values() for one in instructions if one.op != "while" and one.op != "call"
             for name in one.calls}  # fmt: skip
    for name, instructions in computations.items():
        if name in inner or not times[name]:
            continue
        shapes = {one.name: one.shape for one in instructions}
        for one in instructions:
            if one.op not in FREE and not one.op.endswith("-done"):
                total += times[name] * _moved(one, shapes, computations)
    return total


def _main(shape):
    return sizes(shape, main=True)


def _moved(one, shapes, computations):
    if one.op in ("dynamic-slice", "slice", "gather"):
        return 2 * sum(_main(one.shape))
    if one.op == "dynamic-update-slice":
        return 2 * sum(_main(shapes.get(one.operands[1], "")))
    body = computations.get(one.calls[0]) if one.op == "fusion" and one.calls else None
    if body is None:
        return sum(_main(one.shape)) + sum(sum(_main(shapes.get(name, ""))) for name in one.operands)
    own, total = {inner.name: inner for inner in body}, 0
    root = next(inner for inner in body if inner.root)
    for name in root.operands if root.op == "tuple" else [root.name]:
        while own[name].op == "bitcast":
            name = own[name].operands[0]
        if own[name].op == "dynamic-update-slice":  # in place: the stretch that is written
            total += 2 * sum(_main(own[own[name].operands[1]].shape))
        elif own[name].op != "parameter":
            total += sum(_main(own[name].shape))
    return total + sum(_reads(inner, body, computations) for inner in body if inner.op == "parameter")


def _reads(source, body, computations):
    """The most bytes that an instruction of a fusion reads of ``source``."""
    return max((_read(source, user, computations) for user in body if source.name in user.operands and user.op != "tuple"), default=0)


def _read(source, user, computations):
    """Bytes of ``source`` that one instruction reads: a slice its own size, an update in place none, a fusion what is inside."""
    if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == source.name:
        return min(sum(_main(user.shape)), sum(_main(source.shape)))
    if user.op == "dynamic-update-slice" and user.operands[0] == source.name:
        return 0
    body = computations.get(user.calls[0]) if user.op == "fusion" and user.calls else None
    if body is None:
        return sum(_main(source.shape))
    place = f"{user.operands.index(source.name)})"
    return _reads(next(inner for inner in body if inner.op == "parameter" and inner.rest.startswith(place)), body, computations)
