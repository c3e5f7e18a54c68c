"""PEFT's further weight methods beside ours; starts from data; and every kind that PEFT knows, held or lacking with a reason."""

import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import peft as hf_peft
import pytest
import torch
from peft.tuners.c3a import layer as hf_c3a
from peft.tuners.c3a import utils as hf_circulant
from peft.tuners.lora import corda as hf_corda
from peft.tuners.lora import eva as hf_eva
from peft.tuners.lora.config import CordaConfig

from ft_jax import calibrate, kernels, masks, tree
from ft_jax.errors import UserError
from ft_jax.io import files, hf, peft, peft_prompts
from ft_jax.io.peft_kinds import KINDS
from ft_jax.kernels import mixture
from ft_jax.kernels.spectrum import places_of
from tests.parity import peft_adapters, test_peft_aware, test_peft_methods
from tests.parity.peft_adapters import IDS, MODELS, SITES, assert_same, base_model, merged_logits, torch_logits

pytestmark = pytest.mark.slow
# name: (PEFT's config, our rules)
METHODS = {
    "adalora": (lambda t: hf_peft.AdaLoraConfig(init_r=4, lora_alpha=8, total_step=10, target_modules=t), "adalora(rank=4, alpha=8)"),
    "fourierft": (lambda t: hf_peft.FourierFTConfig(n_frequency=50, scaling=20.0, random_loc_seed=5, target_modules=t),
                  "fourierft(count=50, scale=20.0, seed=5)"),
    "waveft": (lambda t: hf_peft.WaveFTConfig(n_frequency=50, scaling=3.0, random_loc_seed=777, target_modules=t),
               "waveft(count=50, scale=3.0)"),
    "c3a": (lambda t: hf_peft.C3AConfig(block_size=4, target_modules=t), "c3a(block=4)"),
    "hra": (lambda t: hf_peft.HRAConfig(r=4, target_modules=t), "hra(rank=4)"),
    "road": (lambda t: hf_peft.RoadConfig(variant="road_1", group_size=4, target_modules=t), "road(group=4)"),
    "road_2": (lambda t: hf_peft.RoadConfig(variant="road_2", group_size=4, target_modules=t), "road(group=4, numbers=2)"),
    "road_4": (lambda t: hf_peft.RoadConfig(variant="road_4", group_size=2, target_modules=t), "road(group=2, numbers=4)"),
    "delora": (lambda t: hf_peft.DeloraConfig(r=4, delora_lambda=3, target_modules=t), "delora(rank=4, bound=3.0)"),
    "gralora": (lambda t: hf_peft.GraloraConfig(r=4, alpha=8, gralora_k=2, target_modules=t), "gralora(rank=4, alpha=8, k=2)"),
    "hira": (lambda t: hf_peft.HiraConfig(r=4, target_modules=t), "hira(rank=4)"),
}  # fmt: skip
# Every kind of the installed PEFT that has no row in KINDS, and why.
LACKING = {
    "MULTITASK_PROMPT_TUNING": "prompts shared among tasks, each times a low-rank matrix of its task; only single-task prompts exist here",
    "ADAPTION_PROMPT": "prompts that enter attention beside the tokens, by a gate of their own; the prefix here shares the tokens' softmax",
    "CPT": "a prompt of real tokens, each held within its own distance of them, with a loss on the prompt's labels",
    "CARTRIDGE": "a key-value cache whose first tokens stay frozen; the prefix here trains all of its own",
    "XLORA": "mixes adapters by a network over hidden states; `loramoe` is the nearest here",
    "VBLORA": "one trained bank of vectors is shared by all matrices, and a kernel trains its own numbers alone",
    "UNILORA": "one trained vector is read by all matrices at fixed random places, as in VBLORA",
    "TINYLORA": "its trained vectors belong to groups of matrices, numbered by the order of PEFT's modules, as in VBLORA",
    "LILY": "A is shared by neighbouring layers and every B by all, mixed by a router over the batch's tokens, as in VBLORA",
    "OSF": "trains the factors of W's smaller singular values, as many numbers as W or more, with gradients kept off the larger: an update",
    "PVERA": "training draws each token's low-rank activation from a distribution; a kernel is one matrix, without random numbers",
    "ADAMSS": "its file leaves out which outputs a subspace moves: PEFT finds them again by torch's random svd_lowrank and scikit-learn's k-means",
    "FROD": "its d_in x d_in basis is made from the matrices of all layers together; a kernel sees the one that it stands for",
    "SHADOW": "a second, trained network runs beside the decoder and corrects the inputs of whole blocks; no matrix changes",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return peft_adapters.make_bases(tmp_path_factory)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_theirs_here(name, family, bases, tmp_path):
    peft_adapters.theirs_here(name, METHODS[name][0], family, bases, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_ours_there_and_one_step(name, bases, tmp_path, monkeypatch):
    # PEFT's C3A passes a wrong gradient on to the layers below (the test after this one); its own dense form has the right one.
    dense = types.SimpleNamespace(apply=lambda x, w: x @ hf_circulant.get_circulant_fast(w).T)
    monkeypatch.setattr(hf_c3a, "BlockCircularConvolution", dense)
    peft_adapters.ours_there_and_one_step(name, METHODS[name][1], bases, tmp_path)


def test_the_gradient_of_c3as_input_there_is_not_that_of_its_matrix():
    """Why the step above is not with PEFT's own backward pass; when this fails, it can be."""
    torch.manual_seed(0)
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 8), (2, 2, 4)))
    found = []
    for product in (hf_circulant.BlockCircularConvolution.apply(x, w), x @ hf_circulant.get_circulant_fast(w).T):
        slopes = torch.autograd.grad(product[:, :3].sum(), (x, w))
        found.append((product.detach(), *slopes))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][2], found[1][2])
    assert not torch.allclose(found[0][1], found[1][1])


@pytest.mark.parametrize("size, count", [(1, 1), (24 * 40, 300), (7, 7)])
@pytest.mark.parametrize("seed", [0, 777, 2**32 - 1])
def test_places_are_torchs(size, count, seed):
    """`fourierft` and `waveft` draw what torch's randperm does, without torch."""
    want = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    np.testing.assert_array_equal(places_of(seed, size, 1, count), want)  # a [size, 1] matrix: its flat places are torch's


def test_adalora_cut_to_its_budget(bases, tmp_path):
    """PEFT saves matrices cut to the triplets that they keep; the others of a stack are filled up with zeros here."""
    config = METHODS["adalora"][0](MODELS["llama"][3])
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    theirs = hf_peft.get_peft_model(base_model("llama", bases), config).eval()
    peft_adapters.move(theirs, "adalora")
    names = [n for n, _ in theirs.named_parameters() if "lora_E" in n]
    keep = {n: [i < 1 + place % 4 for i in range(4)] for place, n in enumerate(names)}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name in keep:
                parameter[~torch.tensor(keep[name])] = 0
    theirs.peft_config["default"].rank_pattern = {n.removeprefix(peft.ROOT): kept for n, kept in keep.items()}
    theirs.save_pretrained(tmp_path)
    model, base = hf.load(bases["llama"])
    params = peft.load_adapter(tmp_path, model, base)
    assert_same(merged_logits(model, params), torch_logits(theirs), merged_logits(model, base), "adalora cut")


def test_skills_both_ways_and_one_step(bases, tmp_path):
    """PEFT's Polytropon of three tasks, each row of the batch of its own: theirs here, ours there, a step of SGD."""
    ids, tasks = torch.tensor(IDS), [2, 1]

    def there(module):
        return module(input_ids=ids, task_ids=torch.tensor(tasks)).logits

    def here(params):
        return peft_adapters.logits(model, mixture.route(params, jnp.asarray(tasks, jnp.int32)))

    config = hf_peft.PolyConfig(r=2, n_tasks=3, n_skills=4, n_splits=2, target_modules=MODELS["llama"][3], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs = hf_peft.get_peft_model(base_model("llama", bases), config).eval()
    peft_adapters.move(theirs, "poly")
    theirs.save_pretrained(tmp_path / "theirs")
    model, base = hf.load(bases["llama"])
    params = peft.load_adapter(tmp_path / "theirs", model, base)
    assert_same(here(params), there(theirs).detach().numpy(), merged_logits(model, base), "poly")
    peft.save_adapter(tmp_path / "ours", model, params, str(bases["llama"]), base=base)
    again = hf_peft.PeftModel.from_pretrained(base_model("llama", bases), tmp_path / "ours", is_trainable=True).eval()
    assert_same(there(again).detach().numpy(), here(params), merged_logits(model, base), "poly, written here")
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    grads = jax.grad(lambda t: jnp.square(here(tree.join(t, frozen))).mean())(trainable)
    there(again).square().mean().backward()
    torch.optim.SGD(peft_adapters.trainable_of(again, "poly").values(), lr=1.0).step()
    again.save_pretrained(tmp_path / "stepped")
    stepped = tree.flatten(peft.load_adapter(tmp_path / "stepped", model, base))
    before, slopes = tree.flatten(trainable), tree.flatten(grads)
    error = max(float(jnp.abs(before[p] - slopes[p] - stepped[p]).max()) for p in slopes)
    print(f"poly: a step moves the weights by {max(float(jnp.abs(g).max()) for g in slopes.values()):.1e}, ours differ by {error:.1e}")
    assert error < 1e-5 and min(float(jnp.abs(g).max()) for g in slopes.values()) > 1e-4


TOKENS = sorted(set(IDS[0, :4].tolist()))
# family, PEFT's config, and which leaf changes here
WITHOUT_KERNEL = {
    "TRAINABLE_TOKENS": ("llama", lambda: hf_peft.TrainableTokensConfig(token_indices=TOKENS, task_type="CAUSAL_LM",
                                                                        target_modules=["embed_tokens"]), "embed/tokens/embedding"),
    "BEFT": ("bert", lambda: hf_peft.BeftConfig(target_modules=["value"], task_type="SEQ_CLS"), "layers/attn/v/bias"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WITHOUT_KERNEL)
def test_plain_leaves_both_ways_and_one_step(kind, bases, tmp_path):
    """Rows of the token table, biases of matrices: theirs here, ours there, and a step of SGD."""
    family, config, path = WITHOUT_KERNEL[kind]
    torch.manual_seed(0)
    theirs = hf_peft.get_peft_model(base_model(family, bases), config()).eval()
    peft_adapters.move(theirs, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    model, base = hf.load(bases[family])
    before = tree.flatten(peft.load_adapter(tmp_path / "theirs", model, base))
    params = tree.nest(before)
    assert_same(merged_logits(model, params), torch_logits(theirs), merged_logits(model, base), kind)
    changed = {p for p, x in before.items() if not np.array_equal(x, tree.flatten(base)[p])}
    assert changed == {path}
    peft.save_adapter(tmp_path / "ours", model, params, str(bases[family]), base=base)
    assert files.read_json(tmp_path / "ours" / "adapter_config.json")["peft_type"] == kind
    again = hf_peft.PeftModel.from_pretrained(base_model(family, bases), tmp_path / "ours", is_trainable=True).eval()
    assert_same(torch_logits(again), merged_logits(model, params), merged_logits(model, base), f"{kind}, written here")
    slope = jax.grad(lambda x: jnp.square(peft_adapters.logits(model, tree.nest(before | {path: x}))).mean())(before[path])
    if kind == "TRAINABLE_TOKENS":
        slope = jnp.zeros_like(slope).at[jnp.asarray(TOKENS)].set(slope[jnp.asarray(TOKENS)])
    again(input_ids=torch.tensor(IDS)).logits.square().mean().backward()
    torch.optim.SGD(peft_adapters.trainable_of(again, kind).values(), lr=1.0).step()
    again.save_pretrained(tmp_path / "stepped")
    stepped = tree.flatten(peft.load_adapter(tmp_path / "stepped", model, base))[path]
    error, moved = float(jnp.abs(before[path] - slope - stepped).max()), float(jnp.abs(slope).max())
    print(f"{kind}: a step moves the weights by {moved:.1e}, ours differ by {error:.1e}")
    assert error < 1e-5 < 1e-3 * moved


# Starts from data


MANY = np.random.default_rng(1).integers(3, 61, (16, 24))  # more tokens than features, so that covariances have an inverse


def statistics(model, params, rules, ids=IDS):
    """`calibrate`'s of a batch, for the kernels of ``rules``."""
    def objective(p, batch, rng):
        return jnp.square(model.apply(p, {"input_ids": batch["input_ids"]})).mean(), {"weight": jnp.float32(len(batch["input_ids"]))}

    batches = [{"input_ids": jnp.asarray(ids, jnp.int32)}]
    return calibrate.gather(kernels.needs(params, rules), model, params, objective, batches)


def modules(torch_model):
    """``{(our path, layer): (name, module)}`` of the adapted matrices of the Llama."""
    ours = {"q_proj": "attn/q", "k_proj": "attn/k", "up_proj": "mlp/up", "down_proj": "mlp/down"}
    out = {}
    for name, module in torch_model.named_modules():
        if name.rpartition(".")[2] in ours:
            out[f"layers/{ours[name.rpartition('.')[2]]}/kernel", int(name.split(".")[2])] = name, module
    return out


def test_statistics_are_those_of_the_inputs(bases):
    """E[x xᵀ], E[x] and ∂L/∂W, measured there by hooks and by backward."""
    theirs, (model, base) = base_model("llama", bases).eval(), hf.load(bases["llama"])
    seen, found = {}, modules(theirs)
    for key, (_, module) in found.items():
        module.register_forward_hook(lambda m, x, y, key=key: seen.update({key: x[0].detach().reshape(-1, x[0].shape[-1])}))
    theirs(input_ids=torch.tensor(IDS)).logits.square().mean().backward()
    data = statistics(model, base, [(SITES, "eva(rank=2)")])
    slopes = statistics(model, base, [(SITES, "lora_ga(rank=2)")])["gradient"]
    for (path, layer), (_, module) in found.items():
        x = seen[path, layer].numpy()
        np.testing.assert_allclose(data["covariance"][path][layer], x.T @ x / len(x), rtol=0, atol=1e-5 * np.abs(x.T @ x / len(x)).max())
        np.testing.assert_allclose(data["mean"][path][layer], x.mean(0), rtol=0, atol=1e-5)
        grad = module.weight.grad.numpy().T
        np.testing.assert_allclose(slopes[path][layer], grad, rtol=0, atol=1e-5 * np.abs(grad).max())


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_corda_starts_and_steps_as_theirs(mode, bases, tmp_path):
    """From the same covariances: the same frozen matrices, logits, and weights after a step; their adapter, as LoRA, here."""
    model, base = hf.load(bases["llama"])
    rules = [(SITES, f"corda(rank=4, alpha=8, mode={mode})")]
    data = statistics(model, base, rules, MANY)
    theirs = base_model("llama", bases).eval()
    held = {name: torch.tensor(np.asarray(data["covariance"][path][layer])) for (path, layer), (name, _) in modules(theirs).items()}
    torch.save(held, tmp_path / "covariances")
    config = hf_peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="corda", target_modules=MODELS["llama"][3], task_type="CAUSAL_LM",
                                corda_config=CordaConfig(corda_method=mode, covariance_file=str(tmp_path / "covariances")))
    hf_corda.preprocess_corda(theirs, config)
    theirs = hf_peft.get_peft_model(theirs, config)
    theirs.peft_config["default"].init_lora_weights = True  # what PEFT asks for before the start is saved to convert it
    theirs.save_pretrained(tmp_path / "start")
    params = kernels.adapt(base, rules, jax.random.key(0), data)
    for (path, layer), (_, module) in modules(theirs.base_model.model).items():
        got, want = tree.flatten(params, kernels.is_kernel)[path].base[layer], module.get_base_layer().weight.detach().numpy().T
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=f"{path} {layer}")
    rate = 0.1
    moved = step(model, params, rate)
    optimizer = torch.optim.SGD(peft_adapters.trainable_of(theirs, "corda").values(), lr=rate)
    theirs(input_ids=torch.tensor(IDS)).logits.square().mean().backward()
    optimizer.step()
    assert_same(merged_logits(model, moved), torch_logits(theirs.eval()), merged_logits(model, base), f"corda {mode} after a step")
    for (path, layer), (_, module) in modules(theirs.base_model.model).items():
        want = (module.get_base_layer().weight + module.get_delta_weight("default")).detach().numpy().T
        got = np.asarray(tree.flatten(kernels.merge(moved))[path][layer])
        assert np.abs(got - want).max() < 1e-5 < 10 * np.abs(got - np.asarray(tree.flatten(base)[path][layer])).max()
    theirs.peft_config["default"].init_lora_weights = "corda"
    theirs.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = peft.load_adapter(tmp_path / "lora", model, base)
    assert_same(merged_logits(model, converted), torch_logits(theirs), merged_logits(model, base), f"corda {mode} as LoRA, here")
    peft.save_adapter(tmp_path / "ours", model, moved, str(bases["llama"]), base=base)
    again = hf_peft.PeftModel.from_pretrained(base_model("llama", bases), tmp_path / "ours").eval()
    assert_same(torch_logits(again), merged_logits(model, moved), merged_logits(model, base), f"corda {mode} as LoRA, there")


def step(model, params, rate):
    """One step of SGD on the mean square of the logits."""
    trainable, frozen = tree.split(params, masks.declared(params, 0))
    grads = jax.jit(jax.grad(lambda t: jnp.square(peft_adapters.logits(model, tree.join(t, frozen))).mean()))(trainable)
    return tree.join(jax.tree.map(lambda x, g: x - rate * g, trainable, grads), frozen)


@pytest.mark.parametrize("rule", ["eva(rank=3, alpha=6)", "lora_ga(rank=3, alpha=6)"])
def test_what_began_from_data_is_lora_there(rule, bases, tmp_path):
    model, base = hf.load(bases["llama"])
    rules = [(SITES, rule)]
    moved = step(model, kernels.adapt(base, rules, jax.random.key(0), statistics(model, base, rules)), rate=1.0)
    peft.save_adapter(tmp_path, model, moved, str(bases["llama"]), base=base)
    theirs = hf_peft.PeftModel.from_pretrained(base_model("llama", bases), tmp_path).eval()
    assert_same(torch_logits(theirs), merged_logits(model, moved), merged_logits(model, base), rule)


def test_eva_starts_as_theirs(bases):
    """One batch seen over and over, so that their incremental SVD is exact: the same directions and the same ranks."""
    model, base = hf.load(bases["llama"])
    rules = [(SITES, "eva(rank=3, alpha=6)")]
    params = tree.flatten(kernels.adapt(base, rules, jax.random.key(0), statistics(model, base, rules, MANY)), kernels.is_kernel)
    theirs = base_model("llama", bases).eval()
    config = hf_peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="eva", target_modules=MODELS["llama"][3], task_type="CAUSAL_LM",
                                eva_config=hf_peft.EvaConfig(rho=2.0, tau=0.999, use_label_mask=False))
    batch = {"input_ids": torch.tensor(MANY), "attention_mask": torch.ones(MANY.shape, dtype=torch.long)}
    found = hf_eva.get_eva_state_dict(copy.deepcopy(theirs), [batch], config, show_progress_bar=False)
    ranks, angles = [], []
    for (path, layer), (name, _) in modules(theirs).items():
        a, want = np.asarray(params[path].a[layer]), found[name].numpy()
        ranks.append((int((np.abs(a).sum(0) > 0).sum()), len(want)))
        both = min(ranks[-1])
        angles += list(np.abs(np.sum(a[:, :both].T * want[:both], 1)))
    print(f"eva: ranks ours/theirs {ranks}, least cosine {min(angles):.5f}")
    assert sum(r for r, _ in ranks) == sum(r for _, r in ranks) == 3 * len(ranks)
    assert min(angles) > 0.99


@pytest.mark.parametrize("name, changes, words", [
    ("hra", {"apply_GS": True}, "apply_GS True is not supported"),
    ("gralora", {"hybrid_r": 2}, "hybrid_r 2 is not supported"),
    ("waveft", {"wavelet_family": "db2"}, "wavelet_family 'db2' is not supported; supported: db1, haar"),
    ("waveft", {"use_idwt": False}, "use_idwt False is not supported"),
    ("fourierft", {"random_loc_seed": None}, "random_loc_seed is None"),
    ("fourierft", {"bias": "all"}, "bias 'all' is not supported; supported: none"),
    ("road", {"variant": "road_3"}, "variant 'road_3' is not supported; supported: road_1, road_2, road_4"),
    ("road", {"group_size": 5}, "group_size 5 does not divide"),
    ("adalora", {"init_r": "4"}, "init_r is '4'"),
    ("delora", {"peft_type": "VBLORA"}, "peft_type 'VBLORA' is not supported"),
])  # fmt: skip
def test_fields_that_are_not_held_are_named(name, changes, words, bases, tmp_path):
    model, base, params = peft_adapters.ours(METHODS[name][1], "llama", bases)
    peft.save_adapter(tmp_path, model, params, str(bases["llama"]), base=base)
    file = tmp_path / "adapter_config.json"
    files.write_json(file, files.read_json(file) | changes)
    with pytest.raises(UserError, match=words) as error:
        peft.load_adapter(tmp_path, model, base)
    assert str(file) in str(error.value) or str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_layers_without_an_adapter_are_left_alone(bases, tmp_path):
    """Only layer 1 of 2 is adapted there: what fills the stack here changes nothing."""
    for name, (config, _) in METHODS.items():
        config = config(MODELS["llama"][3])
        config.layers_to_transform, config.task_type = [1], "CAUSAL_LM"
        if name.startswith("road"):  # its config lacks the field
            config = METHODS[name][0](["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"])
            config.task_type = "CAUSAL_LM"
        torch.manual_seed(0)
        theirs = hf_peft.get_peft_model(base_model("llama", bases), config).eval()
        peft_adapters.move(theirs, name)
        theirs.save_pretrained(tmp_path / name)
        model, base = hf.load(bases["llama"])
        params = peft.load_adapter(tmp_path / name, model, base)
        assert_same(merged_logits(model, params), torch_logits(theirs), merged_logits(model, base), f"{name} of one layer")


def test_every_kind_is_tried():
    """No row of the table is without a method in these three files."""
    tables = {**test_peft_methods.METHODS, **METHODS, **test_peft_aware.METHODS}
    tried = {config(["x"]).peft_type.value for config, _ in tables.values()} | {"LN_TUNING", "POLY", *WITHOUT_KERNEL, *peft_prompts.TYPES}  # prompts: test_peft_prompts.py
    assert tried == set(KINDS)


def test_every_kind_that_peft_knows_is_held_or_lacking_with_a_reason():
    """What the installed PEFT gains shows here."""
    known = {kind.value for kind in hf_peft.PeftType}
    assert known == set(KINDS) | set(LACKING), f"neither held nor lacking: {sorted(known - set(KINDS) - set(LACKING))}"
    assert not set(KINDS) & set(LACKING)
    print(f"held: {', '.join(sorted(KINDS))}\nlacking:\n" + "\n".join(f"  {kind}: {why}" for kind, why in LACKING.items()))
