"""What a model answers, example by example (classification) or target token by target token (causal LM)."""

import jax
import jax.numpy as jnp
import numpy as np

from ft_jax.analysis import calibration
from ft_jax.errors import UserError, nearest


def _classification(logits, batch):
    return logits, batch["label"], jnp.ones(batch["label"].shape) * batch["weight"]


def _causal_lm(logits, batch):
    return logits[:, :-1], batch["input_ids"][:, 1:], batch["loss_mask"][:, 1:] * batch["weight"][:, None]


TARGETS = {"classification": _classification, "causal_lm": _causal_lm}


def predictor(apply, objective):
    """``predict(params, batches) -> {name: [N]}``, compiled once, of ``apply(params, batch) -> logits``.

    Names: prediction (int), correct (bool), confidence (probability of the prediction), nll (of the label, in nats).
    ``batches`` come from ``pipeline.eval_batches``. UserError for an objective without labels of its own.
    """
    if objective not in TARGETS:
        raise UserError(f"no predictions for objective {objective!r}{nearest(objective, TARGETS)}")

    @jax.jit
    def one(params, batch):
        logits, labels, weight = TARGETS[objective](apply(params, batch), batch)
        logs = jax.nn.log_softmax(logits.astype(jnp.float32))
        chosen = logs.argmax(-1)
        nll = -jnp.take_along_axis(logs, labels[..., None], -1)[..., 0]
        return {"prediction": chosen, "correct": chosen == labels, "confidence": jnp.exp(logs.max(-1)), "nll": nll,
                "weight": weight}  # fmt: skip

    def predict(params, batches):
        parts = [jax.tree.map(np.asarray, one(params, batch)) for batch in batches]
        flat = {key: np.concatenate([part[key].reshape(-1) for part in parts]) for key in parts[0]}
        keep = flat.pop("weight") > 0
        return {key: value[keep] for key, value in flat.items()}

    return predict


def scores(found, reference=None):
    """Accuracy, loss (nats), ECE and count of ``predictor``'s answers; with ``reference`` the share that agree."""
    out = {
        "accuracy": float(found["correct"].mean()), "loss": float(found["nll"].mean()),
        "ece": float(calibration.expected_calibration_error(found["confidence"], found["correct"])),
        "count": int(found["correct"].size),
    }  # fmt: skip
    if reference is not None:
        out["agreement"] = float((found["prediction"] == reference["prediction"]).mean())
    return out
