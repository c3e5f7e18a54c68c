"""Gates on a tree: what a mask shuts does not move at all, counts are the papers', one program for all rounds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import masks, registry, tree, updates
from ft_jax.errors import UserError
from tests import gate_trees
from tests.gate_trees import KINDS, LAYERS, make, run

GATES = [m.name for m in registry.methods("mask") if m.traits["gate"]]
DRAWN = [n for n in GATES if "period" in registry.get("mask", n).hyperparameters]
FEW = ["magnitude", "lisa", "lisa restart", "hft"]  # one of each way that a gate is kept
OPTIMISERS = {"adamw": {"weight_decay": 0.1}, "sgd": {"momentum": 0.9, "weight_decay": 0.1}, "lion": {"weight_decay": 0.1}}
HP = {"only_layers": "layers='0-2-5'", "lisa": "n=2,period=2", "hft": "period=2", "greentrainer": "budget=0.3"}


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return gate_trees.write_scores(tmp_path_factory.mktemp("scores"))


def text_of(name, scores, extra=""):
    hp = [HP.get(name, ""), f"scores={scores[KINDS[name]][0]}" if name in KINDS else "", extra]
    return f"{name}({','.join(filter(None, hp))})"


def build(mask, update="adamw", clip=0.0, **hp):
    return updates.build(update, learning_rate=1e-2, steps=50, schedule_name="constant", warmup=0, clip=clip, mask=mask, **hp)[0]


def gate_at(mask, params, step):
    """{path: bool array of the leaf's shape} of a mask of one part."""
    (((name, hp),),) = masks.base.parse(mask)
    on = tree.flatten(registry.call("mask", name, params, step, **hp))

    def whole(path, x):
        m = np.asarray(on[path])
        if m.dtype != bool:
            m = np.isin(np.arange(x.shape[0]), m)
        return np.broadcast_to(m.reshape(m.shape + (1,) * (x.ndim - m.ndim)), x.shape)

    return {path: whole(path, x) for path, x in tree.flatten(params).items()}


# What every gate promises


@pytest.mark.parametrize("name, update", [
    pytest.param(n, u, marks=() if u == "adamw" else pytest.mark.slow)
    for u in OPTIMISERS for n in ([*GATES, "lisa restart"] if u == "adamw" else FEW)])  # fmt: skip
def test_what_is_off_does_not_move_and_what_is_on_does(name, update, scores):
    """Four steps with momentum and weight decay, two rounds of what is drawn; bit for bit."""
    name, *restart = name.split()
    mask = text_of(name, scores, "moments=restart" if restart else "")
    seen, _, compiled = run(build(mask, update, clip=1.0, **OPTIMISERS[update]), 4)
    assert compiled == 1
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        on = gate_at(mask, before if name in DRAWN else seen[0], step)
        moved = {p: np.asarray(x != y) for (p, x), y in zip(tree.flatten(before).items(), jax.tree.leaves(after))}
        assert any(m.any() for m in on.values()) and not all(m.all() for m in on.values())
        for path, m in on.items():
            np.testing.assert_array_equal(moved[path], m, err_msg=f"{path} at step {step}")


@pytest.mark.parametrize("name", FEW)
def test_a_state_saved_and_read_goes_on_bit_for_bit(name, scores):
    """Stopped inside a period: what is drawn is a function of the step that the state holds."""
    name, *restart = name.split()
    mask = text_of(name, scores, "moments=restart" if restart else "").replace("period=2", "period=3")
    straight, states, _ = run(build(mask, weight_decay=0.1), 7)
    copied = jax.tree.map(lambda x: jnp.asarray(np.array(x)), (straight[4], states[4]))
    resumed, _, _ = run(build(mask, weight_decay=0.1), 3, *copied)
    for path, x in tree.flatten(straight[-1]).items():
        np.testing.assert_array_equal(x, tree.flatten(resumed[-1])[path], err_msg=path)


@pytest.mark.parametrize("name", [n if n == "lisa" else pytest.param(n, marks=pytest.mark.slow) for n in FEW])
def test_gates_under_vmap_are_those_of_each_run(name, scores):
    """A population steps all members by one vmap; their learning rates are traced."""
    name, *restart = name.split()
    mask, rates = text_of(name, scores, "moments=restart" if restart else ""), jnp.asarray([1e-2, 3e-2])

    def steps(rate, state):
        tx = updates.build("adamw", learning_rate=rate, steps=9, clip=1.0, mask=mask)[0]

        def step(run, _):
            params, state = run
            moves, state = tx.update(jax.grad(gate_trees.loss)(params), state, params)
            return (jax.tree.map(jnp.add, params, moves), state), None

        return jax.lax.scan(step, (make(), state), None, length=3)[0][0]

    state = build(mask, clip=1.0).init(make())
    both = jax.jit(jax.vmap(steps, in_axes=(0, None)))(rates, state)
    for i, rate in enumerate(rates):
        alone = jax.jit(steps)(rate, state)
        for path, x in tree.flatten(alone).items():
            np.testing.assert_allclose(tree.flatten(both)[path][i], x, rtol=0, atol=1e-6, err_msg=path)


# Which weights


@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
@pytest.mark.parametrize("name", ["random", "magnitude", "fisher", "movement", "lt_sft"])
def test_shares_are_exact_and_of_the_largest_scores(name, share, scores):
    params = make()
    on = gate_at(text_of(name, scores, f"share={share}"), params, 0)
    own = {p: m for p, m in on.items() if not p.startswith("head/")}
    assert on["head/kernel"].all() and on["head/bias"].all(), "the task head is on"
    assert sum(m.sum() for m in own.values()) == round(share * sum(m.size for m in own.values()))
    held = scores[KINDS[name]][1] if name in KINDS else {}
    rank = {"magnitude": lambda p, x: np.abs(x), "movement": lambda p, x: -x * held[p]}.get(name, lambda p, x: held.get(p))
    if name != "random" and share < 1:
        flat = [(rank(p, np.asarray(x)), own[p]) for p, x in tree.flatten(params).items() if p in own]
        values, kept = (np.concatenate([np.ravel(f[i]) for f in flat]) for i in (0, 1))
        assert values[kept].min() > values[~kept].max()


def test_of_equal_scores_the_first_stay():
    on = gate_at("magnitude(share=0.5)", {"w": jnp.zeros(3), "v": jnp.zeros(3)}, 0)
    assert on["v"].tolist() == [True] * 3 and on["w"].tolist() == [False] * 3


def test_random_shares_differ_by_seed_and_smallest_takes_the_other_end():
    params = make()
    first, second = (gate_at(f"random(share=0.5,seed={s})", params, 0)["layers/mlp/up/kernel"] for s in (0, 1))
    assert 0.2 < (first == second).mean() < 0.8
    low, high = (gate_at(f"magnitude(share=0.5,smallest={s})", params, 0) for s in (True, False))
    assert not any((low[p] & high[p]).any() for p in low if not p.startswith("head/"))


def on_by_layer(mask, step):
    """{module: bool [layers]} of what trains in the layers, which is the same for all leaves of a module."""
    out = {}
    for path, m in gate_at(mask, make(), step).items():
        if not path.startswith("layers/"):
            assert m.all(), "embeddings and head are always on"
            continue
        rows = m.reshape(LAYERS, -1)
        assert (rows == rows[:, :1]).all()
        module = masks.layers.module_of(path)
        assert (out.setdefault(module, rows[:, 0]) == rows[:, 0]).all(), "a bias goes with its matrix"
    return out


@pytest.mark.parametrize("moments", ["wait", "restart"])
def test_lisa_draws_n_layers_a_period(moments):
    drawn = []
    for step in range(0, 400, 5):
        rows = {tuple(m) for m in on_by_layer(f"lisa(n=2,period=20,moments={moments})", step).values()}
        assert len(rows) == 1, "a layer is on or off as a whole"
        drawn.append(np.asarray(rows.pop()))
    assert all(m.sum() == 2 for m in drawn)
    for start in range(0, 80, 4):
        assert all((m == drawn[start]).all() for m in drawn[start : start + 4]), "one draw for 20 steps"
    rounds = np.stack(drawn[::4])
    assert rounds.any(0).all() and len({tuple(r) for r in rounds}) > 5, "every layer has its turn"


def test_hft_trains_half_of_every_group_in_every_layer():
    groups = {"attn": 4, "mlp": 3, "norm": 2}
    shares = []
    for step in range(0, 320, 20):
        on = on_by_layer("hft(period=20)", step)
        assert all((m == on_by_layer("hft(period=20)", step + 19)[k]).all() for k, m in on.items())
        for group, size in groups.items():
            members = [m for k, m in on.items() if (k.split("/")[1] == group if group != "norm" else k.endswith("norm"))]
            count = np.stack(members).sum(0)
            assert len(members) == size and set(count) <= {size // 2, -(-size // 2)}
            assert count.sum() * 2 == size * LAYERS, "half over the layers, also of an odd number"
        shares.append(np.stack(list(on.values())))
    assert len({s.tobytes() for s in shares}) == 16, "drawn anew every period"
    assert np.stack(shares).any(0).all(), "every matrix has its turn"


def test_cofitune_and_fpf_pick_modules(scores):
    both = {p for p, m in gate_at("cofitune(modules=attn/q+mlp/down,low=0.3,high=0.7)", make(), 0).items() if m.any()}
    on = {p: m for p, m in gate_at("cofitune(modules=mlp/down,low=0.3,high=0.7)", make(), 0).items() if m.any()}
    assert {p for p in both - set(on)} == {p for p in tree.flatten(make()) if p.startswith("layers/attn/q/")} != set()
    assert set(on) == {"layers/mlp/down/kernel", "layers/mlp/down/bias", "head/kernel", "head/bias"}
    assert on["layers/mlp/down/bias"][:, 0].tolist() == [False, False, True, True, True, False]
    held = scores["change"][1]
    size = {(i, m): np.concatenate([held[p][i].ravel() for p in held if p.startswith("layers/") and masks.layers.module_of(p) == m]).mean()
            for m in on_by_layer("hft", 0) for i in range(LAYERS)}  # fmt: skip
    picked = on_by_layer(text_of("k_fpf", scores, "modules=5"), 0)
    assert {(i, m) for m, rows in picked.items() for i in np.flatnonzero(rows)} == set(sorted(size, key=size.get)[-5:])


# GreenTrainer's tensors


def best_of_all(t_dy, t_dw, importance, budget):
    """The most importance of any subset within the budget, by trying all."""
    total, best = budget * (t_dy.sum() + t_dw.sum()), 0.0
    for chosen in itertools.product([False, True], repeat=len(t_dw)):
        chosen = np.asarray(chosen)
        if chosen.any() and t_dy[np.argmax(chosen) + 1 :].sum() + t_dw[chosen].sum() <= total + 1e-9:
            best = max(best, importance[chosen].sum())
    return best


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_greentrainers_choice_is_the_best_of_all(seed, budget):
    """Whole costs and as many levels as their sum: nothing is lost to rounding."""
    rng = np.random.default_rng(seed)
    t_dy, t_dw = rng.integers(0, 6, 9).astype(float), rng.integers(1, 9, 9).astype(float)
    importance = rng.uniform(0.1, 1, 9)
    levels = int(t_dy.sum() + t_dw.sum())
    chosen = masks.select(t_dy, t_dw, importance, budget, levels)
    cost = t_dy[np.argmax(chosen) + 1 :].sum() + t_dw[chosen].sum() if chosen.any() else 0
    assert cost <= budget * levels + 1e-9
    assert importance[chosen].sum() == pytest.approx(best_of_all(t_dy, t_dw, importance, budget))


def test_greentrainer_never_overspends_when_costs_are_rounded():
    rng = np.random.default_rng(5)
    for budget in (0.1, 0.3, 0.6):
        t_dy, t_dw = rng.uniform(1, 9, 40), rng.uniform(1, 9, 40)
        chosen = masks.select(t_dy, t_dw, rng.uniform(0, 1, 40), budget)
        cost = t_dy[np.argmax(chosen) + 1 :].sum() + t_dw[chosen].sum()
        assert 0.8 * budget < cost / (t_dy.sum() + t_dw.sum()) <= budget


def test_greentrainers_budget_shuts_more_modules(scores):
    sizes = [sum(m.sum() for m in on_by_layer(f"greentrainer(budget={b},scores={scores['gradient'][0]})", 0).values())
             for b in (0.1, 0.4, 1.0)]  # fmt: skip
    assert 0 < sizes[0] < sizes[1] < sizes[2] == 9 * LAYERS


# Together


def test_parts_joined_by_plus_are_met_and_by_bar_are_united(scores):
    params = make()
    one, two, three = ("magnitude(share=0.3)", "random(share=0.4)", text_of("fisher", scores, "share=0.2"))
    found = tree.flatten(masks.fixed(masks.gates(f"{one}|{two}+{three}").fixed, params))
    alone = [gate_at(m, params, 0) for m in (one, two, three)]
    for path, m in found.items():
        expected = (alone[0][path] | alone[1][path]) & alone[2][path]
        np.testing.assert_array_equal(np.broadcast_to(np.asarray(m), expected.shape), expected)
    both = f"{two}+lisa(n=1,period=2)"
    seen, _, compiled = run(build(both, weight_decay=0.1), 3)
    assert compiled == 1
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        on = gate_at("lisa(n=1,period=2)", params, step)
        for (path, x), y in zip(tree.flatten(before).items(), jax.tree.leaves(after)):
            np.testing.assert_array_equal(np.asarray(x != y), on[path] & alone[1][path])


def test_a_cofitune_of_weights_meets_shares_of_them():
    found = tree.flatten(masks.fixed(masks.gates("cofitune+random(share=0.5)").fixed, make()))
    assert found["layers/mlp/up/kernel"].shape == (LAYERS, 4, 6) and not np.asarray(found["layers/mlp/up/kernel"])[0].any()


def test_lisa_with_restarts_holds_state_of_its_layers_alone():
    params = make()
    layers = tree.count(params["layers"])
    rest = tree.count(params) - layers
    state = build("lisa(n=2,moments=restart)").init(params)
    numbers = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert numbers == 2 * (rest + layers * 2 // LAYERS)
    waiting = build("lisa(n=2)").init(params)
    assert sum(x.size for x in jax.tree.leaves(waiting) if x.ndim) == 2 * (rest + layers) + LAYERS  # a step count a layer


def test_off_weights_have_no_moments():
    _, states, _ = run(build("magnitude(share=0.2)"), 3)
    on = tree.flatten(states[-1].on)
    moments = {p: x for p, x in tree.flatten(states[-1].inner).items() if "/mu/" in p or "/nu/" in p}
    assert len(moments) == 2 * len(on)
    for path, x in moments.items():
        m = np.broadcast_to(np.asarray(on[path.split("/mu/")[-1].split("/nu/")[-1]]), x.shape)
        assert not np.asarray(x)[~m].any() and np.asarray(x)[m].all()


@pytest.mark.parametrize(
    "mask, update, words",
    [
        ("lisa+hft", "adamw", ["lisa, hft", "one alone"]),
        ("lisa|random", "adamw", ["lisa, random", "one alone"]),
        ("lisa(n=9)", "adamw", ["'lisa'", "n is 9", "6 layers train"]),
        ("lisa(n=0)", "adamw", ["n is 0", "at least 1"]),
        ("lisa(period=0)", "adamw", ["period is 0", "at least 1"]),
        ("lisa(moments=reset)", "adamw", ["'reset'", "'wait' or 'restart'"]),
        ("lisa", "sam", ["'sam' sees the tree as a whole", "'lisa'", "nearest: 'adamw'"]),
        ("hft(perod=3)", "adamw", ["no parameter 'perod'", "nearest: 'period'"]),
        ("random(share=0.0)", "adamw", ["share is 0.0"]),
        ("random(share=1e-9)", "adamw", ["share 1e-09 of", "at least"]),
        ("fisher", "adamw", ["needs scores=FOLDER", "'fisher'", "ft_jax.importance"]),
        ("cofitune(modules=mpl)", "adamw", ["no module 'mpl'", "nearest: 'mlp'"]),
        ("cofitune(low=0.9,high=0.9)", "adamw", ["no layer of 6"]),
        ("greentrainer(budget=2.0)", "adamw", ["budget is 2.0"]),
        ("magnitud", "adamw", ["no mask called 'magnitud'", "nearest: 'magnitude'"]),
        ("bitfit|random", "adamw", ["whole leaves", "join them by '+'"]),
    ],
)
def test_a_mask_that_cannot_be_is_one_line(mask, update, words):
    with pytest.raises(UserError) as error:
        masks.whole(make(), mask)
        jax.eval_shape(build(mask, update).init, make())
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), str(error.value)


def test_scores_that_do_not_fit_name_the_leaf(scores, tmp_path):
    with pytest.raises(UserError, match="holds scores of kind 'fisher', and this mask takes 'change'"):
        build(f"lt_sft(scores={scores['fisher'][0]})").init(make())
    short = jax.tree.map(lambda x: x[1:] if x.shape[0] == LAYERS else x, make())
    with pytest.raises(UserError, match=r"layers/attn/k/bias has scores of shape \(6, 4\), its weights are \(5, 4\)"):
        build(f"fisher(scores={scores['fisher'][0]})").init(short)
    with pytest.raises(UserError, match="no tensor 'other'"):
        build(f"fisher(scores={scores['fisher'][0]})").init({"other": jnp.ones(3)})
