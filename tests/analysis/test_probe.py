"""Linear probes: the optimum that an independent solver finds, chance where there is nothing, the right activations."""

import numpy as np
import pytest
from scipy import optimize, special

from ft_jax.analysis import probe
from ft_jax.errors import UserError
from ft_jax.objectives import inputs_of
from tests import helpers


def blobs(rng, rows, apart=3.0):
    labels = rng.integers(3, size=rows)
    return rng.standard_normal((rows, 5)) * [1, 1, 1, 1e-2, 30] + apart * np.eye(5)[labels], labels


def test_a_probe_reads_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    train, test = blobs(rng, 300), blobs(rng, 300)
    nothing = [(rng.standard_normal(x.shape), y) for x, y in (train, test)]
    features = [np.stack([a[0], b[0]]) for a, b in zip((train, test), nothing, strict=True)]
    found = probe.probe((features[0], train[1]), (features[1], test[1]), 3)
    alone = probe.probe(train, test, 3)
    assert found.shape == (2,) and found[0] == alone > 0.9 and abs(found[1] - 1 / 3) < 0.1


def test_the_probe_is_at_the_optimum_of_its_loss():
    x, y = blobs(np.random.default_rng(1), 200, apart=1.0)
    found = probe.fit(x, y, 3, l2=0.0, steps=2000)

    def loss(flat):
        w, b = flat[:15].reshape(5, 3), flat[15:]
        return -special.log_softmax(x @ w + b, axis=1)[np.arange(len(y)), y].mean()

    ours = loss(np.concatenate([np.asarray(found.kernel).ravel(), np.asarray(found.bias - found.mean @ found.kernel)]))
    assert ours == pytest.approx(optimize.minimize(loss, np.zeros(18)).fun, abs=1e-4)


def test_residuals_are_the_models_own():
    model = helpers.make_model("llama")
    params, batch = helpers.make_params(model), inputs_of(helpers.make_batch(model, padded=False))
    found = probe.residuals(model.apply, params, [batch, batch], place=-2)
    assert found.shape == (model.config.num_layers + 1, 2 * len(batch["input_ids"]), model.config.hidden_size)
    _, seen = model.apply(params, batch, capture=("embed", "block_out"))
    np.testing.assert_allclose(found[0, :4], seen["embed"][:, -2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1:, 4:], seen["block_out"][:, :, -2], rtol=1e-4, atol=1e-5)


def test_bad_labels():
    x = np.zeros((4, 2))
    for labels, message in (([0, 1, 2, 3], "do not fit 3 classes"), ([0, -1, 0, 0], "do not fit"), ([0, 1], "needs"), ([0] * 4, None)):
        if message:
            with pytest.raises(UserError, match=message):
                probe.fit(x, labels, 3)
        else:
            assert np.isfinite(probe.fit(x, labels, 3).kernel).all()
    with pytest.raises(UserError, match="two examples or more"):
        probe.fit(x[:1], [0], 3)
