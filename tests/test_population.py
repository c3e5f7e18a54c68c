"""A population is its members: the same weights as each run alone, resumed bit for bit, one failure that costs no other."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ft_jax import masks, population, stacking, train, tree, updates
from ft_jax.errors import UserError
from ft_jax.io import runs
from ft_jax.kernels import LowRank
from tests import folders

LINEAR = r"layers/(attn|mlp)/\w+/kernel"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    folders.make_model_folder(home / "bert", num_hidden_layers=2)
    folders.write_rows(home / "reviews.jsonl", folders.reviews(np.random.default_rng(0), 120))
    return home


def config(home, **groups):
    """A classification run; every keyword is a group or key of the config, groups are merged."""
    cfg = {
        "steps": 8, "batch_size": 8, "model": {"path": str(home / "bert"), "head": "classification"},
        "data": {"source": str(home / "reviews.jsonl"), "num_labels": 2, "max_length": 16},
        "optimizer": {"learning_rate": 3e-3}, "eval": {"every": 4, "metric": "accuracy"}, "save": {"every": 4, "keep": 1},
        "log": {"every": 1, "tensorboard": False}, "mesh": {"data": 1},
    }  # fmt: skip
    for key, value in groups.items():
        cfg[key] = {**cfg.get(key, {}), **value} if isinstance(value, dict) else value
    return cfg


def low_rank(text, **groups):
    return {"method": {"name": text, "kernels": ((LINEAR, text),)}, **groups}


def weights(folder):
    """{path: array} of everything a run holds at its end."""
    return {p: np.asarray(x) for p, x in tree.flatten(runs.load_run(folder, "last")[1]).items()}


def assert_same_weights(folder, reference, atol=1e-5):
    """Equal within ``atol``; but for the keys' biases, whose gradient is rounding alone and which Adam blows up."""
    first, second = weights(reference), weights(folder)
    assert first.keys() == second.keys()
    for path, value in first.items():
        if path != "layers/attn/k/bias":
            np.testing.assert_allclose(second[path], value, rtol=0, atol=atol, err_msg=path)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Each member is the run it would be alone

KINDS = {
    "lora": lambda home: {
        "r1": config(home, **low_rank("lora(rank=1, alpha=2)")),
        "r4": config(home, **low_rank("lora(rank=4, alpha=8)"), seed=3, optimizer={"learning_rate": 1e-2}),
        "r2": config(home, **low_rank("lora(rank=2, alpha=8)"), seed=1, data={"limit": 60}),
    },
    "lora_b": lambda home: {
        f"r{rank}": config(home, **low_rank(f"lora_b(rank={rank})"), seed=rank, accumulate=2) for rank in (1, 3)
    },
    "pissa": lambda home: {
        f"r{rank}": config(home, **low_rank(f"pissa(rank={rank})"), optimizer={"name": "lora_plus"}) for rank in (1, 3)
    },
    "full": lambda home: {
        f"s{seed}": config(home, seed=seed, optimizer={"learning_rate": 1e-3 * (1 + seed)}) for seed in (0, 1)
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(home):
    """(configs, folder, summaries) of an uninterrupted population of three LoRA runs: rank, alpha, lr, seed, data mixed."""
    configs = KINDS["lora"](home)
    return configs, home / "lora", population.train(configs, home / "lora")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "lora_b", "full", "pissa"])
def test_each_member_is_the_run_it_would_be_alone(kind, home, tmp_path, request):
    """Dropout on, batches and rates their own: weights, metrics, checkpoints and DONE as `train.train` leaves them."""
    if kind == "lora":
        configs, folder, found = request.getfixturevalue("lora")
    else:
        configs, folder = KINDS[kind](home), tmp_path / "all"
        found = population.train(configs, folder)
    members = {tuple(json.loads((folder / n / "population.json").read_text())["members"]) for n in configs}
    assert len(members) == 1, "all of them are one program"
    for name, cfg in configs.items():
        alone = train.train(cfg, tmp_path / name)
        assert_same_weights(folder / name, tmp_path / name)
        assert found[name] == json.loads((folder / name / "DONE").read_text())
        assert found[name].keys() == alone.keys()
        same = ("steps", "best_step", "best_accuracy", "trainable_parameters", "total_parameters", "optimizer_bytes")
        assert {k: found[name][k] for k in same} == {k: alone[k] for k in same}
        ours, theirs = rows_of(folder / name), rows_of(tmp_path / name)
        assert [r.keys() for r in ours] == [r.keys() for r in theirs]
        for one, two in zip(ours, theirs):
            assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
        steps = [sorted(p.name for p in (root / "checkpoints").iterdir()) for root in (folder / name, tmp_path / name)]
        assert steps[0] == steps[1] == ["8"]
    first, last = (weights(folder / name) for name in (min(configs), max(configs)))
    assert any(first[p].shape != last[p].shape or not np.allclose(first[p], last[p], atol=1e-4) for p in first)


@pytest.mark.parametrize("name", stacking.PADDED)
def test_padding_stays_zero_and_changes_nothing(name):
    """Five steps of each update on W + s A B: columns of A and rows of B that are zero stay so, the rest is as without."""
    rng = np.random.default_rng(0)
    base, x, target = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((6, 5), (7, 6), (7, 5)))
    a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((6, 2), (2, 5)))
    narrow = {"w": {"kernel": LowRank(base, a, b, jnp.asarray(0.5))}}
    wide = {"w": {"kernel": LowRank(base, jnp.pad(a, ((0, 0), (0, 3))), jnp.pad(b, ((0, 3), (0, 0))), jnp.asarray(0.5))}}
    ends = []
    for params in (narrow, wide):
        trainable, frozen = tree.split(params, masks.declared(params, 0))
        tx, _ = updates.build(name, learning_rate=1e-2, steps=5, clip=1.0, **({} if name == "adamw_l1" else {"weight_decay": 0.1}))
        state = tx.init(trainable)
        for _ in range(5):
            grads = jax.grad(lambda t, f=frozen: jnp.square(tree.join(t, f)["w"]["kernel"].dot(x) - target).mean())(trainable)
            moves, state = tx.update(grads, state, trainable)
            trainable = optax.apply_updates(trainable, moves)
        ends.append(trainable["w"]["kernel"])
    assert not np.asarray(ends[1].a[:, 2:]).any() and not np.asarray(ends[1].b[2:]).any()
    np.testing.assert_allclose(ends[1].a[:, :2], ends[0].a, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ends[1].b[:2], ends[0].b, rtol=0, atol=1e-6)
    assert float(jnp.abs(ends[0].b - b).max()) > 1e-3


def products(jaxpr):
    """Shapes of the operands of every matrix product of a program, scans and branches included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(v.aval.shape for v in eqn.invars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.slow
def test_the_frozen_base_is_multiplied_once_for_all(home, tmp_path, monkeypatch):
    """Every product with a base matrix takes the inputs of all members at once; none has a copy of it a member."""
    seen = []

    def watched(*args, step_of=stacking.step_of):
        step = step_of(*args)
        return lambda *inputs: seen.append(jax.make_jaxpr(step)(*inputs)) or step(*inputs)

    monkeypatch.setattr(stacking, "step_of", watched)
    configs = {n: {**c, "steps": 1} for n, c in KINDS["lora"](home).items()}
    population.train(configs, tmp_path)
    shapes = list(products(seen[0].jaxpr))
    base = {(32, 32), (32, 48), (48, 32)}
    layers = [sorted(pair, key=len) for pair in shapes if max(map(len, pair)) == 4]  # the pooler, trained whole, sees 3 axes
    once = [rows for matrix, rows in layers if matrix in base]
    assert len(once) >= 2 * 6  # q, k, v, out, up, down; forward and backward
    assert {rows[:2] for rows in once} == {(len(configs), 8)}
    assert not [pair for pair in layers if pair[0] in {(len(configs), *s) for s in base}]


# Who trains with whom


@pytest.fixture
def groups(home, tmp_path, monkeypatch):
    """``(configs, **options) -> sorted names of each program``; nothing is trained."""

    def of(configs, **options):
        found = []

        def note(group, *rest):
            found.append([m.name for m in group])
            return {m.name: {"steps": 0} for m in group}

        monkeypatch.setattr(population, "_train", note)
        population.train(configs, tmp_path / "never", **options)
        assert not (tmp_path / "never").exists()
        return found

    return of


def test_programs_hold_what_can_share_one(home, groups, monkeypatch):
    monkeypatch.setattr(population, "SMALL_RANK", 2)
    monkeypatch.setattr(population, "SPREAD", 3)
    ranks = {f"r{r}": config(home, **low_rank(f"lora(rank={r})")) for r in (16, 1, 9, 2, 3)}
    assert groups(ranks) == [["r1", "r2", "r3"], ["r9", "r16"]], "padding is bounded"
    assert groups(ranks, size=2) == [["r1", "r2"], ["r3", "r9"], ["r16"]]
    others = {
        "a": config(home, **low_rank("lora(rank=1)")), "b": config(home, **low_rank("lora(rank=1)"), seed=5),
        "steps": config(home, **low_rank("lora(rank=1)"), steps=9), "rslora": config(home, **low_rank("rslora(rank=1)")),
        "frozen_a": config(home, **low_rank("lora_b(rank=1)")), "sgd": config(home, **low_rank("lora(rank=1)"), optimizer={"name": "sgd"}),
        "full": config(home), "full2": config(home, optimizer={"learning_rate": 1.0}, data={"limit": 50}),
    }  # fmt: skip
    assert sorted(groups(others)) == [["a", "b"], ["frozen_a"], ["full", "full2"], ["rslora"], ["sgd"], ["steps"]]
    whole = {f"r{r}": config(home, **low_rank(f"lora(rank={r})"), optimizer={"name": "adafactor"}) for r in (1, 2)}
    assert groups(whole) == [["r1"], ["r2"]], "Adafactor looks at whole matrices: no padding"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimizer": {"nmae": "adamw"}}, "odd: unknown config key 'optimizer.nmae'; nearest: 'name'"),
        (low_rank("lora(rank=99)"), "odd: layers/attn/k/kernel: rank 99 does not fit a 32x32 matrix"),
        ({"optimizer": {"name": "lora_plus"}}, "odd: update 'lora_plus' is for low-rank kernels"),
        ({"save": 3}, "odd: config key 'save' holds 3"),
        ({"mesh": {"data": 1, "fsdp": 2}}, "odd: a population shards its members over mesh.data"),
    ],
)
def test_a_config_at_fault_is_named_before_anything_trains(home, tmp_path, change, message):
    with pytest.raises(UserError) as error:
        population.train({"fine": config(home), "odd": {**config(home), **{
            k: {**config(home).get(k, {}), **v} if isinstance(v, dict) else v for k, v in change.items()}}}, tmp_path / "runs")  # fmt: skip
    assert str(error.value).startswith(message) and not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="size=0"):
        population.train({}, tmp_path, size=0)


# Stops and failures


def held(folder, name):
    """({path: array}, meta) of the newest checkpoint of a run."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder / name) as manager:
        step = manager.latest_step()
        items = [p.name for p in (folder / name / str(step)).iterdir() if p.is_dir() and p.name != "meta"]
        found = manager.restore(step, args=ocp.args.Composite(
            **{item: ocp.args.StandardRestore() for item in items}, meta=ocp.args.JsonRestore()))  # fmt: skip
    return {f"{item}:{path}": np.asarray(x) for item in items for path, x in found[item].items()}, found["meta"]


def assert_same_runs(folder, reference, names):
    """Bit for bit: checkpoints, best, metrics, and what DONE says of the result."""
    for name in names:
        for part in ("checkpoints", "best"):
            (one, meta), (two, other) = held(folder / name, part), held(reference / name, part)
            assert one.keys() == two.keys() and meta == other
            for path, value in one.items():
                np.testing.assert_array_equal(value, two[path], err_msg=f"{name} {path}")
        assert rows_of(folder / name) == rows_of(reference / name)
        keys = ("steps", "best_step", "validation", "trainable_parameters")
        one, two = (json.loads((root / name / "DONE").read_text()) for root in (folder, reference))
        assert {k: one[k] for k in keys} == {k: two[k] for k in keys}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before a checkpoint", "between two", "within the second save"])
def test_resumes_bit_for_bit(lora, tmp_path, monkeypatch, where):
    """Only one checkpoint is kept, and yet a stop within a save leaves a step that all members hold."""
    configs, reference, _ = lora
    saves, traces, step_of = [], [], stacking.step_of

    def log(run, step, metrics, log=runs.Run.log):
        log(run, step, metrics)
        if step == {"before a checkpoint": 2, "between two": 6}.get(where) and run.path.name == "r2":
            raise RuntimeError("stopped here")

    def save(run, name, step, items, meta, save=runs.Run.save):
        save(run, name, step, items, meta)
        saves.append((name, step))
        if where == "within the second save" and saves.count(("checkpoints", 8)) == 2:
            raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", log)
        patch.setattr(runs.Run, "save", save)
        with pytest.raises(RuntimeError, match="stopped here"):
            population.train(configs, tmp_path)
    assert not any((tmp_path / name / "DONE").exists() for name in configs)

    def counted(cfg, objective, join, shardings):
        return step_of(cfg, lambda *a: traces.append(1) or objective(*a), join, shardings)

    monkeypatch.setattr(stacking, "step_of", counted)
    population.train(dict(reversed(configs.items())), tmp_path)
    assert_same_runs(tmp_path, reference, configs)
    assert len(traces) <= 3, "compiled once: the loss, its shapes, its gradient"


def test_finished_runs_return_at_once(lora, monkeypatch):
    configs, folder, found = lora
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    monkeypatch.setattr(train, "prepare", lambda *a, **k: pytest.fail("a finished run was prepared again"))
    assert population.train(configs, folder) == found
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.slow
def test_a_member_that_diverges_costs_no_other(lora, home, tmp_path, monkeypatch, capsys):
    """It keeps its folder and a message; the others end as they do without it, also when stopped and resumed."""
    configs, reference, _ = lora
    wild = config(home, **low_rank("lora(rank=2, alpha=4)"), optimizer={"learning_rate": 1e38, "clip": 0.0, "name": "sgd"})
    configs = {n: {**c, "optimizer": {**wild["optimizer"], "learning_rate": 1e-2}} for n, c in configs.items()}
    found = population.train({**configs, "wild": wild}, tmp_path / "all")
    assert "wild: the loss or its gradient stopped being finite by step" in capsys.readouterr().err
    assert found["wild"] == {"failed": (tmp_path / "all" / "wild" / "FAILED").read_text().strip()}
    assert not (tmp_path / "all" / "wild" / "DONE").exists()
    assert all(np.isfinite(list(row.values())).all() for row in rows_of(tmp_path / "all" / "wild"))
    for name in configs:
        assert found[name]["steps"] == 8 and len(rows_of(tmp_path / "all" / name)) == 8 + 2
    alone = train.train(configs["r2"], tmp_path / "r2")
    assert_same_weights(tmp_path / "all" / "r2", tmp_path / "r2")
    assert found["r2"]["best_accuracy"] == alone["best_accuracy"]

    def crash(run, step, metrics, log=runs.Run.log):
        log(run, step, metrics)
        if step == 6:
            raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", crash)
        with pytest.raises(RuntimeError, match="stopped here"):
            population.train({**configs, "wild": wild}, tmp_path / "again")
    again = population.train({**configs, "wild": wild}, tmp_path / "again")
    assert again["wild"]["failed"] == found["wild"]["failed"].replace("/all/", "/again/")
    assert_same_runs(tmp_path / "again", tmp_path / "all", configs)


@pytest.mark.slow
def test_patience_stops_a_member_alone(home, tmp_path, monkeypatch):
    """Scripted losses fall as B grows, so a learning rate of 0 is stopped; the other goes on, also after a restart."""

    def scripted(objective):
        def evaluate(trainable, frozen, batches):
            return {"loss": -float(sum(jnp.abs(x).sum() for p, x in tree.flatten(trainable).items() if p.endswith("/b")))}

        return evaluate

    def crash(run, step, metrics, log=runs.Run.log):
        log(run, step, metrics)
        if step == 5:
            raise RuntimeError("stopped here")

    monkeypatch.setattr(train, "make_eval", scripted)
    common = {"eval": {"metric": "loss", "patience": 1, "every": 2}, "save": {"every": 3}, **low_rank("lora(rank=2)")}
    configs = {"stuck": config(home, **common, optimizer={"learning_rate": 0.0}), "moves": config(home, **common)}
    found = population.train(configs, tmp_path / "all")
    assert [found[n]["steps"] for n in configs] == [4, 8] and found["stuck"]["best_step"] == 2
    assert [[p.name for p in (tmp_path / "all" / n / "checkpoints").iterdir()] for n in configs] == [["4"], ["8"]]
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", crash)
        with pytest.raises(RuntimeError, match="stopped here"):
            population.train(configs, tmp_path / "again")
    again = population.train(configs, tmp_path / "again")
    assert {n: s["steps"] for n, s in again.items()} == {n: s["steps"] for n, s in found.items()}
    assert_same_runs(tmp_path / "again", tmp_path / "all", configs)


@pytest.mark.slow
def test_members_spread_over_devices(lora, home, tmp_path, monkeypatch):
    """Two members on two devices, a device each; what does not divide stays whole. The same weights."""
    configs, reference, _ = lora
    placed = []
    monkeypatch.setattr(stacking, "stack", lambda trees, mesh, stack=stacking.stack: placed.append(stack(trees, mesh)) or placed[-1])
    both = {n: {**configs[n], "mesh": {"data": 2}} for n in ("r1", "r4")}
    population.train(both, tmp_path)
    for leaf in jax.tree.leaves(placed[0]):
        assert len(leaf.sharding.device_set) == 2 and not leaf.sharding.is_fully_replicated
    for name in both:
        assert_same_weights(tmp_path / name, reference / name)
