"""Long sequences and large bases: attention by blocks of queries, and frozen weights kept in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ft_jax import kernels, masks, recipe, tree
from ft_jax.errors import UserError
from ft_jax.models import attention
from tests.helpers import assert_trees_close, make_batch, make_model, make_objective, make_params


@pytest.mark.parametrize("queries, per_query, blocks", [(128, 2**20, 1), (4096, 2**18, 8), (96, 2**22, 3), (7, 2**25, 7), (4, 2**30, 4)])
def test_the_least_number_of_blocks_that_divides_the_queries(queries, per_query, blocks):
    assert attention.query_blocks(queries, per_query) == blocks


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_blocks_of_queries_change_nothing(family, monkeypatch):
    """Causal, windowed and padded attention, value and gradient; and no array of all scores."""
    model = make_model(family)
    params, batch = make_params(model), make_batch(model, 2, 12)
    objective, found = make_objective("classification" if family == "bert" else "causal_lm", model), []
    for limit in (2**27, 2 * 4 * 12 * 4):
        monkeypatch.setattr(attention, "SCORES", limit)
        fn = jax.jit(jax.value_and_grad(lambda p: objective(p, batch, None)[0]))
        found.append((*fn(params), "x12x12xf32>" in fn.lower(params).as_text()))
    (whole, grads, all_scores), (parts, cut, still) = found
    assert all_scores and not still
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    assert_trees_close(cut, grads, rtol=1e-4, atol=1e-6)


def test_frozen_matrices_in_bfloat16():
    model = make_model("llama", dtype="bfloat16")
    params = kernels.adapt(make_params(model), ((r"layers/.*/kernel", "lora(rank=2)"),), jax.random.key(0))
    mask = masks.declared(params, 0)
    lean = recipe.stored(params, mask, "bfloat16")
    kinds = {path: x.dtype for path, x in tree.flatten(lean).items()}
    assert {kinds["layers/attn/q/kernel/base"], kinds["embed/tokens/embedding"]} == {jnp.dtype(jnp.bfloat16)}
    assert {kinds["layers/attn/q/kernel/a"], kinds["norm/scale"]} == {jnp.dtype(jnp.float32)}
    shapes = recipe.stored(jax.eval_shape(lambda: params), mask, "bfloat16")
    assert {path: x.dtype for path, x in tree.flatten(shapes).items()} == kinds
    batch, objective = make_batch(model), make_objective("causal_lm", model)
    np.testing.assert_allclose(objective(lean, batch, None)[0], objective(params, batch, None)[0], rtol=1e-6)
    with pytest.raises(UserError, match="model.frozen_dtype 'bf16' is not supported.*bfloat16"):
        recipe.stored(params, mask, "bf16")


def test_an_untied_language_models_head_stays_frozen_beside_adapters():
    """A classifier's head is the task's own and trains with them."""
    for family, head, trains in (("mistral", None, False), ("mistral", "classification", True)):
        model = make_model(family, head)
        spec = {"model": {"path": "tiny"}, "method": {"kernels": [(r"layers/.*/kernel", "lora(rank=2)")]}, "seed": 0}
        _, _, mask, _ = recipe.build(spec, recipe.Base(model, make_params(model), (), ""))
        assert tree.flatten(mask)["head/kernel"] is trains
        spec["method"]["trainable"] = [("head/.*", True), ("layers/.*", True)]
        assert tree.flatten(recipe.build(spec, recipe.Base(model, make_params(model), (), ""))[2])["head/kernel"] is True
