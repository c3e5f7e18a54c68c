"""Opening the weights: spectra, grafts, and what was forgotten. Every part is a JSON file, written once."""

import json
import time

import numpy as np
from tqdm.auto import tqdm

from experiments.demo import measure
from ft_jax import registry, tree
from ft_jax.analysis import predictions, spectral
from ft_jax.data import pipeline
from ft_jax.io import files
from ft_jax.weights import graft

K, EPS = 10, 0.5
SWEEP = tuple(round(0.1 * i, 1) for i in range(1, 10))
HEAT = 16  # singular vectors on each side of a similarity heat-map


def once(path, make, clock):
    """The value in the JSON at ``path``; made and written whole if it is not there yet. Its seconds go to ``clock``."""
    if not path.exists():
        started = time.perf_counter()
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps({"seconds": time.perf_counter() - started, "value": value}, indent=1).encode())
    held = json.loads(path.read_text())
    clock[path.stem] = held["seconds"]
    return held["value"]


def all_scores(s, model, folder, trees, data):
    """{name: {test: scores, ood: scores, choice: accuracy}} of the base and every run."""
    out = {}
    for name, params in trees.items():
        out[name] = {part: predictions.scores(measure.predict(model, params, data[part], s, f"{name}: {part}"))
                     for part in ("test", "ood") if part in data}  # fmt: skip
    if s.choice:
        for name, found in measure.choices(model, trees, folder, s.choice).items():
            out[name]["choice"] = found["accuracy"]
    return out


def task(s, scores, data):
    """What was measured, for the report."""
    base = scores["base"]["test"]
    p = base["accuracy"]
    return {**s.words, "count": base["count"], "standard_error": float((p * (1 - p) / base["count"]) ** 0.5),
            "train_examples": len(data["train"])}  # fmt: skip


def spectra(base, params, label):
    """Rows {path, layer, shape, intruders at EPS, by ε, effective rank, norms} for every linear layer, and the totals."""
    rows = []
    first, second = tree.flatten(base), tree.flatten(params)
    paths = [p for p in first if p.startswith("layers/") and p.endswith("/kernel")]
    for path in tqdm(paths, desc=f"spectra {label}", unit="stack", leave=False):
        found = spectral.spectral(first[path], second[path], k=K, eps=EPS)
        sweep = {eps: spectral.count_intruders(found["max_cosine"], k=K, eps=eps) for eps in SWEEP}
        for layer in range(first[path].shape[0]):
            rows.append({
                "path": path.removeprefix("layers/").removesuffix("/kernel"), "layer": layer,
                "shape": list(first[path].shape[1:]), "intruders": int(found["intruders"][layer]),
                "by_eps": {str(e): int(n[layer]) for e, n in sweep.items()},
                "lowest_cosine": float(found["max_cosine"][layer].min()),
                **{key: float(found[key][layer]) for key in
                   ("effective_rank", "stable_rank", "delta_norm", "delta_norm_relative")},
            })  # fmt: skip
    total = {
        "matrices": len(rows), "intruders": sum(r["intruders"] for r in rows),
        "by_eps": {str(e): sum(r["by_eps"][str(e)] for r in rows) for e in SWEEP},
        "effective_rank": float(np.mean([r["effective_rank"] for r in rows])),
        "delta_norm": float(np.sqrt(sum(r["delta_norm"] ** 2 for r in rows))),
        "delta_norm_relative": float(np.mean([r["delta_norm_relative"] for r in rows])),
    }  # fmt: skip
    return {"rows": rows, "total": total}


def heatmaps(base, params_by_run, path, layer):
    """|U0ᵀ U| of the top singular vectors of one matrix, for every run."""
    index = f"layers/{path}/kernel"
    first = np.asarray(tree.flatten(base)[index][layer])
    maps = {
        name: spectral.similarity(first, np.asarray(tree.flatten(p)[index][layer]), top=HEAT)["similarity"].tolist()
        for name, p in params_by_run.items()
    }
    return {"path": path, "layer": layer, "maps": maps}


def _loss(model, objective):
    """``(params, batch) -> mean loss`` in evaluation mode."""
    fn = registry.get("objective", objective).fn
    return lambda params, batch: fn(lambda p, inputs, rng, **of: model.apply(p, inputs, **of), params, batch, None)[0]


def _micro(data, examples, micro, seed):
    """Endless batches ``[examples / micro, micro, …]`` of the training set."""
    for batch in pipeline.prefetch(pipeline.batches(data, examples, seed)):
        yield {k: np.reshape(v, (examples // micro, micro, *v.shape[1:])) for k, v in batch.items()}


def grafts(s, model, base, full, data):
    """Base, tuned and grafted scores by mask and size, and the smallest graft that keeps 95 % of the tuned accuracy.

    Masks are scored on the test set; a learned mask is selected on the validation set.
    """
    kept_out = {}

    def found(params, label):
        return measure.predict(model, params, data["test"], s, label)

    kept_out["base"], kept_out["tuned"] = found(base, "graft: base"), found(full, "graft: tuned")
    low, high = (predictions.scores(kept_out[n]) for n in ("base", "tuned"))
    gain = high["accuracy"] - low["accuracy"]
    g, rng, points = s.graft, np.random.default_rng(s.seed), []

    def point(mask_name, sparsity, mask, history=None):
        got = found(graft.apply_graft(base, full, mask), f"graft: {mask_name} {sparsity:g}")
        scores, (count, share) = predictions.scores(got), graft.mask_size(mask)
        points.append({
            "mask": mask_name, "sparsity": sparsity, "share": share, "parameters": count, "scores": scores,
            "kept": (scores["accuracy"] - low["accuracy"]) / gain if gain else None,
            "agreement": predictions.scores(got, kept_out["tuned"])["agreement"], "history": history,
            "where": _where(mask),
        })  # fmt: skip

    for sparsity in g["sparsities"]:
        point("magnitude", sparsity, graft.magnitude_mask(base, full, sparsity))
    for sparsity in g["random"]:
        point("random", sparsity, graft.random_mask(base, sparsity, rng))

    def score(params):
        return predictions.scores(measure.predict(model, params, data["validation"], s))["accuracy"]

    for sparsity in g["learned"]:
        mask, history = graft.learn_mask(
            base, full, _loss(model, s.objective), _micro(data["train"], g["examples"], g["micro"], s.seed), score,
            sparsity=sparsity, steps=g["steps"], learning_rate=g["learning_rate"], seed=s.seed,
        )  # fmt: skip
        point("learned", sparsity, mask, history)
    keeps = [p for p in points if p["scores"]["accuracy"] >= 0.95 * high["accuracy"] and p["mask"] != "random"]
    smallest = min(keeps, key=lambda p: p["parameters"], default=None)
    return {"base": low, "tuned": high, "eligible": sum(m.size for m in graft.magnitude_mask(base, full, 0.0).values()),
            "points": points, "smallest": smallest and {
                "mask": smallest["mask"], "share": smallest["share"], "parameters": smallest["parameters"],
                "kept": smallest["kept"], **smallest["scores"]}}  # fmt: skip


def _where(mask):
    """Parameters of a mask by matrix kind."""
    out = {}
    for row in graft.mask_shares(mask):
        kind = row["path"].removeprefix("layers/").rsplit("/", 1)[0]
        out[kind] = out.get(kind, 0) + row["parameters"]
    return out


WHY = {
    "classification": (
        "This sentence encoder has no masked-LM head, so its own pre-training objective is measured: it was trained by contrast to "
        "recognise which texts belong together, and here each half of a held-out review has to find its other half among 64. The loss "
        "is InfoNCE at scale 20 on the pooled embeddings, without the task's head. The texts are film reviews too, the only ones the demo "
        "fetches: what a run gains in that domain counts against what it forgets."
    ),
    "causal_lm": (
        "A language model was pre-trained to predict text, so forgetting is the perplexity on passages of novels (LAMBADA's, never trained "
        "on here), and accuracy on ARC-Challenge questions, each choice scored by its log-probability per character. A model of this size "
        "is near the 25 % of guessing on ARC, and 80 questions have a standard error of 5 points: it is the perplexity that tells the runs apart."
    ),
}
MEASURES = {
    "classification": [
        {"key": "loss", "label": "contrastive loss", "format": ".3f"},
        {"key": "accuracy", "label": "other half found", "format": ".1%"},
    ],
    "causal_lm": [
        {"key": "perplexity", "label": "perplexity on novels", "format": ".2f"},
        {"key": "arc", "label": "ARC-Challenge accuracy", "format": ".1%"},
    ],
}


def forgotten(s, model, folder, trees):
    """Forgetting of every tree against the base, by the measure that fits the model (``WHY``)."""
    if s.objective == "classification":
        scores = measure.contrastive(model, trees, s, folder)
    else:
        arc = measure.choices(model, trees, folder, s.forgetting["choice"])
        scores = {n: {**x, "arc": arc[n]["accuracy_norm"]} for n, x in measure.books(model, trees, s, folder).items()}
    return {"measures": MEASURES[s.objective], "scores": scores}
