"""Plans: FLOPs and traffic against closed forms, what is refused, and a real TPU topology where libtpu is installed."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.train import method
from ft_jax import flops, hlo, parallel, plan
from ft_jax.errors import UserError
from ft_jax.models import config_from_hf

MESH = parallel.make_mesh(fsdp=8, data=1)
TINY = plan._llama(256, 64, 128, 4, 4, 2)


def test_flops_of_loops_branches_and_recomputation():
    def body(x, w):
        return jax.nn.gelu(x @ w), None

    def fn(x, ws):
        y, _ = jax.lax.scan(jax.checkpoint(body), x, ws)
        return jax.lax.cond(y.sum() > 0, lambda v: v @ v.T, lambda v: v[:, :8], y).sum()

    x, ws = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    forward, square = 5 * 2 * 8 * 16 * 16, 2 * 8 * 16 * 8
    assert flops.count(fn, x, ws) == forward + square
    assert flops.count(lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"), jnp.ones((2, 3, 8, 8)), jnp.ones((4, 3, 3, 3))) == 2 * 2 * 4 * 64 * 27
    plain = jax.grad(lambda x, w: body(x, w)[0].sum(), argnums=(0, 1))
    assert flops.count(plain, x, ws[0]) == 3 * 2 * 8 * 16 * 16, "forward, with respect to x, with respect to w"


def compiled(fn, *args):
    """The text of a program whose arguments are ``(array, PartitionSpec)``."""
    placed = [jax.device_put(x, NamedSharding(MESH, spec)) for x, spec in args]
    return jax.jit(fn).lower(*placed).compile().as_text()


def test_bytes_that_travel():
    """An all-gather of each of five weights in a loop, an all-reduce at the end, by the ring: (n - 1) / n and twice that."""
    def fn(x, ws):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(MESH, P()))), None), x, ws)
        return y.sum()

    text = compiled(fn, (jnp.ones((8, 256)), P("fsdp")), (jnp.ones((5, 256, 256)), P(None, "fsdp")))
    rows = {r["op"]: r for r in hlo.collectives(text)}
    assert rows["all-gather"] == {"op": "all-gather", "across": False, "count": 5, "bytes": 5 * 256 * 256 * 4 * 7 / 8}
    assert rows["all-reduce"]["bytes"] == 2 * 4 * 7 / 8
    halves = {r["op"]: r["across"] for r in hlo.collectives(text, slice_of=[0] * 4 + [1] * 4)}
    assert halves == {"all-gather": True, "all-reduce": True}
    assert not any(r["across"] for r in hlo.collectives(text, slice_of=[0] * 8))


def test_bytes_that_memory_moves():
    """In a loop over six weights each is cut out of the stack (read and written), multiplied (two read, one written)."""
    def fn(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    x, ws = jnp.ones((256, 256)), jnp.ones((6, 256, 256))
    text = jax.jit(fn).lower(x, ws).compile().as_text()
    one = 256 * 256 * 4
    assert 6 * 5 * one <= hlo.moved(text) <= 6 * 8 * one, "and at most copied once, not the stack of six each time"


@pytest.mark.parametrize("text, expected", [
    ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
    ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
])  # fmt: skip
def test_groups_in_every_way_they_are_written(text, expected):
    np.testing.assert_array_equal(hlo.groups(text), expected)


@pytest.mark.parametrize("text, traffic", [
    ("  %a = f32[8,4]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}", 8 * 4 * 4 * 3 / 4),
    ("  %a = (f32[2,4], f32[8,4]) all-gather-start(%x), replica_groups={{0,1,2,3}}", 8 * 4 * 4 * 3 / 4),
    ("  %a = f32[2,4]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3}}", 2 * 4 * 4 * 3),
    ("  %a = bf16[8]{0} all-reduce(%x), replica_groups={{0,1}}", 2 * 16 / 2),
    ("  %a = (bf16[8], bf16[8]) all-reduce(%x, %y), replica_groups={{0,1}}", 2 * 32 / 2),
    ('  %a = (bf16[8], u32[], token[]) send(%x, %t), channel_id=2, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}', 2 * 16 / 2),
    ("  %a = bf16[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 16),
])  # fmt: skip
def test_a_ring_sends(text, traffic):
    rows = hlo.collectives("ENTRY %main () -> f32[] {\n" + text + "\n}\n")
    assert rows[0]["bytes"] == traffic


def small(text="lora(rank=4)", mesh="fsdp=4,tensor=2", **changes):
    sizes = plan.mesh_for(mesh, 8)
    group, optimizer = method(text)
    options = dict(name="tiny", batch=8, length=16, remat="none", dtype="float32", frozen_dtype="float32", accumulate=1) | changes
    cfg = plan.config(group, optimizer, mesh=sizes, **options)
    return plan.planned(cfg, config_from_hf(TINY, head="lm"), jax.devices())


@pytest.mark.parametrize("text, share", [("full", 1.0), ("lora(rank=4)", None)])
def test_a_step_planned_on_eight_devices(text, share):
    step = small(text)
    row = plan.report(step, *plan.compiled(step), "cpu:8")
    matrices, tokens = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 64 * 256, 8 * 16
    attention = 3 * 4 * 8 * 16**2 * 4 * 16 * 4
    if share:
        assert row["model_flops"] * 8 == 6 * matrices * tokens + attention
        assert row["flops"] * 8 == row["model_flops"] * 8 + attention / 6, "only the scores of attention are computed again"
    else:
        assert 4 * matrices * tokens + attention < row["model_flops"] * 8 < 4.4 * matrices * tokens + attention
        assert row["trainable"] == 4 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    assert row["tokens"] == tokens and row["chips"] == 8 and row["fits"] is None
    assert row["collective_bytes"] > 0 and row["network_bytes"] == 0
    weights = row["parameters"] * 4 / 8
    assert weights < row["bytes_held"] < 6 * weights


@pytest.mark.slow
def test_less_is_held_with_frozen_weights_in_bfloat16():
    held, frozen = [], 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 2 * 64 * 256
    for dtype in ("float32", "bfloat16"):
        step = small(frozen_dtype=dtype, mesh="fsdp=8")
        held.append(plan.report(step, *plan.compiled(step), "cpu:8")["bytes_held"])
    assert held[0] - held[1] == 2 * frozen / 8


@pytest.mark.parametrize("call, message", [
    (lambda: plan.devices("v7e:4x4"), "no chip called 'v7e'.*nearest: 'v[56]e'"),
    (lambda: plan.devices("v5e:big"), "the topology 'v5e:big' has no shape; give it as v5e:16x16"),
    (lambda: plan.read_model("llama-2-70"), "no model called 'llama-2-70'.*llama-2-70b"),
    (lambda: plan.mesh_for("fdsp=4", 8), "cannot read 'fdsp=4' in the mesh.*fsdp"),
    (lambda: plan.mesh_for("tensor=0", 8), "the mesh axis tensor takes a positive number, not '0'"),
    (lambda: small(mesh="fsdp=16"), "does not fit 8 devices"),
    (lambda: small(batch=6, mesh="fsdp=8"), "batch_size 6 is not a multiple of data x fsdp = 8"),
    (lambda: small("corda(rank=4)"), "starts from data, and a plan has none"),
])  # fmt: skip
def test_what_a_plan_refuses(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.slow
def test_the_command(tmp_path):
    """On virtual devices, two slices of four; and the file of rows."""
    out = tmp_path / "rows.json"
    command = [sys.executable, "scripts/plan.py", "--model=smollm2-135m", "--method=lora(rank=4)", "--topology=cpu:4", "--slices=2", "--length=64",
               "--mesh=tensor=1", f"--out={out}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400)
    (row,) = json.loads(out.read_text())
    assert row["mesh"] == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1} and row["tokens"] == 8 * 64
    assert "virtual devices" in done.stdout and "all-gather" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPU topologies, is not installed")
def test_a_real_topology(tmp_path):
    """In a process of its own: libtpu ends one that has XLA flags which it does not know, such as the tests' own."""
    out = tmp_path / "rows.json"
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    command = [sys.executable, "scripts/plan.py", f"--model={tmp_path}", "--method=lora(rank=4)", "--topology=v5e:2x2", "--slices=2", "--batch=16",
               "--length=128", f"--out={out}"]  # fmt: skip
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=400, env=os.environ | {"XLA_FLAGS": ""})
    (row,) = json.loads(out.read_text())
    assert row["slices"] == 2 and row["network_bytes"] > 0 and row["fits"] and 0 < row["mfu"][1] < row["mfu"][0] < 1
