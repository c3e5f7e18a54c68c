"""Kernels that hold several adapters: chosen by task or example (banks, skills), or weighed by the input (experts).

Which adapters the rows of a batch take is data in the tree: `route` puts it there, as a pure function.
Einsum letters: b row of the batch, i input, o output, r rank, e expert, s skill, d numbers of a split.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ft_jax import tree
from ft_jax.errors import UserError
from ft_jax.kernels.base import Kernel, dense, dot, is_kernel, term_weight
from ft_jax.kernels.lowrank import LowRank, _sizes
from ft_jax.registry import Parents, register


class Routed(Kernel):
    """W + scale · A B with the A, B of a row's task; subclasses have ``choices`` and ``factors(tasks) -> A, B``.

    tasks int32: ``[..., B]`` for the rows of a batch, ``[...]`` for one task, None before `route`.
    """

    def _factors(self):
        if self.tasks is None and self.choices > 1:
            raise UserError(f"a {type(self).__name__} kernel holds {self.choices} tasks; say with route(params, ids) which rows have")
        return self.factors(jnp.zeros((), jnp.int32) if self.tasks is None else self.tasks)

    def dot(self, x):
        (a, b), scale = (f.astype(x.dtype) for f in self._factors()), self.scale.astype(x.dtype)
        if a.ndim == 2:
            low = dot(b, dot(a, x) * scale)
        elif a.shape[0] == x.shape[0]:
            low = jnp.einsum("b...r,bro->b...o", jnp.einsum("b...i,bir->b...r", x, a) * scale, b)
        else:
            raise UserError(f"{a.shape[0]} rows have a task, the batch has {x.shape[0]} rows")
        return dot(self.base, x) + low

    def dense(self):
        if len(self.shape) > 2:
            return jax.vmap(type(self).dense)(self)
        if self.tasks is not None and self.tasks.ndim:
            raise UserError(f"a {type(self).__name__} kernel is a matrix for each row; route(params, task) takes one for all")
        a, b = self._factors()
        return dense(self.base) + self.scale * jnp.einsum("ir,ro->io", a, b, precision="highest")


@struct.dataclass
class Bank(Routed):
    """W + scale · A_t B_t, t the adapter of a row; A ``[..., n, d_in, r]``, B ``[..., n, r, d_out]``, scale ``[...]``."""

    base: jax.Array | Kernel
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    tasks: jax.Array | None = None

    trainable = ("a", "b")

    @property
    def choices(self):
        return self.a.shape[-3]

    def factors(self, tasks):
        return self.a[tasks], self.b[tasks]


@struct.dataclass
class Skills(Routed):
    """W + scale · A_t B_t, each split of A_t and B_t the mean of its skills by σ(logits_t) / Σ σ(logits_t).

    logits ``[..., tasks, q, s]``, A ``[..., q, s, d_in / q, r]``, B ``[..., q, s, r, d_out / q]``, scale ``[...]``.
    """

    base: jax.Array | Kernel
    a: jax.Array
    b: jax.Array
    logits: jax.Array
    scale: jax.Array
    tasks: jax.Array | None = None

    trainable = ("a", "b", "logits")

    @property
    def choices(self):
        return self.logits.shape[-3]

    def factors(self, tasks):
        shares = jax.nn.sigmoid(self.logits[tasks])
        return self.mixed(shares / shares.sum(-1, keepdims=True))

    def mixed(self, shares):
        """A ``[..., d_in, r]`` and B ``[..., r, d_out]`` of ``shares [..., q, s]`` of the skills."""
        parts = range(shares.shape[-2])
        # Split by split: XLA's partitioner gave a sharded reshape of all splits at once other numbers (jax 0.10.2).
        a = [jnp.einsum("...s,sdr->...dr", shares[..., q, :], self.a[q], precision="highest") for q in parts]
        b = [jnp.einsum("...s,srd->...rd", shares[..., q, :], self.b[q], precision="highest") for q in parts]
        return jnp.concatenate(a, -2), jnp.concatenate(b, -1)


@struct.dataclass
class SkillRouter(Skills):
    """`Skills` that trains the routing alone (MHR-z)."""

    trainable = ("logits",)


@struct.dataclass
class Experts(Kernel):
    """W + scale · Σ_e softmax(x G)_e A_e B_e; G ``[..., d_in, e]``, A ``[..., e, d_in, r]``, B ``[..., e, r, d_out]``.

    weight and delta ``[...]`` of the balance term, None without it.
    """

    base: jax.Array | Kernel
    gate: jax.Array
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    weight: jax.Array | None = None
    delta: jax.Array | None = None

    trainable, term, reads = ("gate", "a", "b"), "balance", True

    def gates(self, x):
        """The weights of the experts, ``[..., e]`` float32."""
        return jax.nn.softmax(jnp.matmul(x.astype(jnp.float32), self.gate), axis=-1)

    def penalty(self, x, real, tasks):
        """var(Z) / mean(Z)², Z = (1 ± delta) · the share of each expert in each row; + where both are of one kind.

        x ``[B, T, d_in]``, real ``[B, T]``: tokens that count, tasks ``[B]`` or None. Rows of task 0 and the first half of
        the experts are of one kind, the others of the other.
        """
        share = (self.gates(x) * real[..., None]).sum(1) / jnp.maximum(real.sum(1), 1)[:, None]
        rows = jnp.zeros(x.shape[0], bool) if tasks is None else tasks > 0
        experts = 2 * jnp.arange(share.shape[-1]) >= share.shape[-1]
        z = share * jnp.where(rows[:, None] == experts, 1 + self.delta, 1 - self.delta)
        return z.var() / jnp.square(z.mean())

    def dot(self, x):
        low = jnp.einsum("...i,eir->...er", x, self.a.astype(x.dtype)) * self.gates(x)[..., None].astype(x.dtype)
        return dot(self.base, x) + jnp.einsum("...er,ero->...o", low, self.b.astype(x.dtype)) * self.scale.astype(x.dtype)

    def dense(self):
        if self.gate.shape[-1] > 1:
            raise UserError("experts weighed by the input stand for no one matrix and cannot be merged")
        low = jnp.einsum("...ir,...ro->...io", self.a[..., 0, :, :], self.b[..., 0, :, :], precision="highest")
        return dense(self.base) + self.scale[..., None, None] * low


@struct.dataclass
class Gated(Experts):
    """`Experts` that are frozen, of which each token takes the ``top [...]`` most likely, their weights made to sum to 1."""

    top: jax.Array | None = None

    trainable, term = ("gate",), "gate"

    def gates(self, x):
        chances = Experts.gates(self, x)
        rank = jnp.argsort(jnp.argsort(-chances, axis=-1), axis=-1)
        kept = jnp.where(rank < self.top, chances, 0.0)
        return kept / kept.sum(-1, keepdims=True)

    def check_tasks(self, tasks):
        if tasks != self.gate.shape[-1]:
            raise UserError(f"the gate's loss takes task t to adapter t of {self.gate.shape[-1]}, and the data have {tasks} tasks; "
                            "give as many sources in the order of the runs, or gate_loss=0")

    def penalty(self, x, real, tasks):
        """-log softmax(x G)_t over the real tokens, t the task of a row; shapes as for `Experts`."""
        chances = jax.nn.log_softmax(jnp.matmul(x, self.gate), axis=-1)
        own = jnp.take_along_axis(chances, tasks[:, None, None], axis=-1)[..., 0]
        return -(own * real).sum() / jnp.maximum(real.sum(), 1)


def _uniform(rng, shape, d_in):
    return jax.random.uniform(rng, shape, jnp.float32, -(d_in**-0.5), d_in**-0.5)


def _positive(**counts):
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} {count} is below 1")


@register("kernel", "bank", paper="arXiv:2311.03285")
def bank(w, rng, *, adapters=1, rank=8, alpha=16.0):
    """Bank of adapters (as S-LoRA serves them): W + (alpha / rank) · A_t B_t, t the adapter that `route` gives a row.

    Every A is Kaiming-uniform, every B = 0; `collect` makes a bank of trained adapters. A row costs what LoRA costs it.
    Raises UserError for a rank above the matrix and, without a route, when more than one adapter is there.
    """
    stack, d_in, d_out = _sizes(w, rank)
    _positive(adapters=adapters)
    a = _uniform(rng, (*stack, adapters, d_in, rank), d_in)
    return Bank(w, a, jnp.zeros((*stack, adapters, rank, d_out), jnp.float32), jnp.full(stack, alpha / rank, jnp.float32))


@register("kernel", "polytropon", paper="arXiv:2202.13914", fit={"skills": 2})
def polytropon(w, rng, *, tasks=1, skills=4, rank=8):
    """Polytropon: W + (1 / rank) · A_t B_t, A_t = Σ_s z_ts A_s and B_t alike, z_t = σ(Z_t) / Σ σ(Z_t), t from `route`.

    Z ~ U(±1e-3), A Kaiming-uniform, B = 0. The paper's Gumbel noise in training is left out. Raises UserError for a
    rank above the matrix and, without a route, when more than one task is there.
    """
    return _skills(w, rng, tasks, skills, 1, rank)


@register("kernel", "mhr", paper="arXiv:2211.03831", fit={"skills": 2})
def mhr(w, rng, *, tasks=1, skills=4, splits=4, rank=8):
    """Multi-head routing: Polytropon with a routing of its own for each of ``splits`` parts of the inputs and outputs.

    ``mhr_z`` and ``mhr_mu`` take its skills to new tasks. Raises UserError for splits that do not divide both sides, and
    what ``polytropon`` does.
    """
    return _skills(w, rng, tasks, skills, splits, rank)


def _single(runs):
    if len(runs) > 1:
        raise UserError(f"the skills of one run can be taken, not of {len(runs)}")
    return runs[0]


def _skills_of(runs):
    k = _single(runs)
    return {"a": k.a, "b": k.b, "scale": k.scale}


@register("kernel", "mhr_z", paper="arXiv:2211.03831", start="moved", parents=Parents(Skills, "mhr or polytropon", _skills_of))
def mhr_z(w, rng, *, runs="", tasks=1, start=None):
    """MHR-z: the skills of a finished run of ``mhr`` or ``polytropon``, frozen, with new routings Z, which train.

    Z ``[tasks, splits, skills]`` ~ U(±1e-3) as there; start: a, b and scale of `Skills`. Heads and all else of that run
    are left. Raises UserError for more than one run.
    """
    del runs
    a, b, scale = (jnp.asarray(start[field]) for field in ("a", "b", "scale"))
    _positive(tasks=tasks)
    return SkillRouter(w, a, b, _logits(rng, w.shape[:-2], tasks, *a.shape[-4:-2]), scale)


def _mean_of(runs):
    k = _single(runs)
    equal = jnp.full(k.logits.shape[-2:], 1 / k.logits.shape[-1], jnp.float32)

    def mean(kernel):
        return jax.vmap(mean)(kernel) if len(kernel.shape) > 2 else kernel.mixed(equal)

    a, b = mean(k)
    return {"a": a, "b": b, "scale": k.scale}


@register("kernel", "mhr_mu", paper="arXiv:2211.03831", start="moved", parents=Parents(Skills, "mhr or polytropon", _mean_of))
def mhr_mu(w, rng, *, runs="", start=None):
    """MHR-μ: LoRA that starts from the mean of a finished run's skills, W + (1 / rank) · mean_s(A_s) mean_s(B_s), no routing.

    The published code keeps all skills, weighed alike, and trains them: the same matrix and, under Adam, the same steps of
    it. start: a, b and scale of `LowRank`. Raises UserError as ``mhr_z`` does.
    """
    del rng, runs
    return LowRank(w, *(jnp.asarray(start[field]) for field in ("a", "b", "scale")))


def _logits(rng, stack, *shape):
    return jax.random.uniform(rng, (*stack, *shape), jnp.float32, -1e-3, 1e-3)


def _skills(w, rng, tasks, skills, splits, rank):
    stack, d_in, d_out = _sizes(w, rank)
    _positive(tasks=tasks, skills=skills, splits=splits)
    if d_in % splits or d_out % splits:
        fits = max(n for n in range(1, splits) if d_in % n == 0 and d_out % n == 0)
        raise UserError(f"splits {splits} do not divide both sides of a {d_in}x{d_out} matrix; nearest: {fits}")
    keys = jax.random.split(rng)
    a = _uniform(keys[0], (*stack, splits, skills, d_in // splits, rank), d_in // splits)
    b = jnp.zeros((*stack, splits, skills, rank, d_out // splits), jnp.float32)
    return Skills(w, a, b, _logits(keys[1], stack, tasks, splits, skills), jnp.full(stack, 1 / rank, jnp.float32))


@register("kernel", "loramoe", paper="arXiv:2312.09979", fit={"experts": 1})
def loramoe(w, rng, *, experts=6, rank=4, alpha=8.0, balance=0.01, delta=0.1):
    """LoRAMoE: W + (alpha / rank) · Σ_e softmax(x G)_e A_e B_e, a router G for each matrix; A, G Kaiming-uniform, B = 0.

    The loss has ``balance`` times the localised balance, var(Z) / mean(Z)² as the published code has it (0: none; the
    defaults of both are ours). More than one expert cannot be merged. Raises UserError for a rank above the matrix.
    """
    stack, d_in, d_out = _sizes(w, rank)
    _positive(experts=experts)
    keys = jax.random.split(rng)
    gate, a = _uniform(keys[0], (*stack, d_in, experts), d_in), _uniform(keys[1], (*stack, experts, d_in, rank), d_in)
    b = jnp.zeros((*stack, experts, rank, d_out), jnp.float32)
    weight = term_weight(balance, stack)
    low = Experts(w, gate, a, b, jnp.full(stack, alpha / rank, jnp.float32), weight)
    return low if weight is None else low.replace(delta=jnp.full(stack, delta, jnp.float32))


def _adapters_of(runs):
    a, b = _together(runs)
    return {"a": a, "b": b, "scale": jnp.ones(a.shape[:-3], jnp.float32)}


@register("kernel", "meteora", paper="arXiv:2405.13053", start="moved", merges=False, fit={"k": 3},
          parents=Parents(LowRank, "lora", _adapters_of))  # fmt: skip
def meteora(w, rng, *, runs="", k=2, gate_loss=0.0, start=None):
    """MeteoRA: W + Σ_e g_e A_e B_e of finished runs' LoRA; g the ``k`` largest of softmax(x G), summing to 1; G trains.

    A gate for each matrix, by token, Kaiming-uniform. The loss may have ``gate_loss`` times the cross-entropy of softmax(x G)
    with the adapter of a row's task (the published code: 50). Left out: dropout. start: a ``[..., e, d_in, r]``, b
    ``[..., e, r, d_out]`` with their scales in it, scale 1. Stands for no one matrix and cannot be merged. Raises UserError
    for fewer than two adapters, and a k above them.
    """
    del runs
    a, b, scale = (jnp.asarray(start[field]) for field in ("a", "b", "scale"))
    *stack, count, d_in, _ = a.shape
    if count < 2:
        raise UserError("one adapter leaves meteora's gate nothing to choose; name two runs or more, as FOLDER:FOLDER")
    if not 1 <= k <= count:
        raise UserError(f"k {k} of {count} adapters cannot be taken; largest: {count}")
    weight = term_weight(gate_loss, stack)
    return Gated(w, _uniform(rng, (*stack, d_in, count), d_in), a, b, scale, weight, top=jnp.full(stack, k, jnp.int32))


def _is_routed(x):
    return isinstance(x, Routed)


def route(params, ids):
    """``params`` whose routed kernels know the task of each row: ``ids`` int32 ``[B]``, or one number for all rows.

    None leaves the routes as they are. Raises UserError that names the leaf for ids beyond its tasks, and for None where
    there is more than one task and no route.
    """
    seen = () if ids is None or isinstance(ids, jax.core.Tracer) else np.unique(ids)  # a traced id cannot be looked at
    found = None if ids is None else jnp.asarray(ids, jnp.int32)

    def put(path, leaf):
        if not _is_routed(leaf):
            return leaf
        if found is None and leaf.tasks is None and leaf.choices > 1:
            raise UserError(f"{path} holds {leaf.choices} tasks and the batch has no task ids; data.sources gives them")
        if found is None:
            return leaf
        for task in seen:
            if not 0 <= task < leaf.choices:
                raise UserError(f"{path} holds {leaf.choices} tasks, numbered from 0; there is no task {task}")
        return leaf.replace(tasks=jnp.broadcast_to(found, (*leaf.shape[:-2], *found.shape)))

    return tree.map_with_path(put, params, is_leaf=_is_routed)


def _together(kernels):
    """A and B of `LowRank` kernels on a new axis, ranks padded with zeros, scales in B."""
    rank = max(k.a.shape[-1] for k in kernels)
    a = [jnp.pad(k.a, [(0, 0)] * (k.a.ndim - 1) + [(0, rank - k.a.shape[-1])]) for k in kernels]
    b = [k.b * k.scale[..., None, None] for k in kernels]
    b = [jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rank - x.shape[-2]), (0, 0)]) for x in b]
    return jnp.stack(a, -3), jnp.stack(b, -3)


def collect(trees):
    """One tree with a `Bank` where ``trees`` of one base have `LowRank` kernels; smaller ranks are padded with zeros.

    Everything but the factors is taken from the first tree. Raises UserError that names a leaf without its `LowRank`.
    """
    flat = [tree.flatten(t, is_leaf=is_kernel) for t in trees]

    def together(path, leaf):
        if not isinstance(leaf, LowRank):
            return leaf
        kernels = [f.get(path) for f in flat]
        if not all(isinstance(k, LowRank) and k.shape == leaf.shape for k in kernels):
            raise UserError(f"{path} is no low-rank kernel of shape {leaf.shape} in every tree")
        return Bank(leaf.base, *_together(kernels), jnp.ones_like(leaf.scale))

    return tree.map_with_path(together, trees[0], is_leaf=is_kernel)
