"""A search down a tree of places to train, by what is learnt and what is forgotten: CoFiTune's coarse level (arXiv:2404.10306).

A *tree* is a JSON object. ``branches`` are ``{branch: {node: {parameter: value, …, "then": branch}}}``: nodes that are
alternatives, and the branch below one. ``start`` is the branch at the top; ``settings`` are train config keys as in
`search`, with ``{name}`` for a parameter of the node or the nearest one above that sets it, or of ``parameters``.
``versatility`` are data settings of general text, ``keep`` how many nodes of a level are gone down from, ``weight`` what
a nat of forgetting costs. Each node is a run; results.jsonl, chosen.json and index.html are written after every one.
"""

import functools
import json

import jax
from tqdm.auto import tqdm

from ft_jax import kernels, recipe, search, train
from ft_jax.analysis import forgetting, report
from ft_jax.data import examples, pipeline
from ft_jax.errors import UserError, nearest
from ft_jax.io import files, hf, runs, tokenizer

KEYS = {"parameters": {}, "settings": {}, "start": "", "branches": {}, "versatility": {}, "keep": 1, "weight": 1.0}
THEN = "then"


# The tree


def check(tree):
    """The tree with defaults filled in; UserError for what is none, a parameter that no setting names, a branch never met."""
    if odd := [key for key in tree if key not in KEYS]:
        raise UserError(f"tree: unknown key {odd[0]!r}{nearest(odd[0], KEYS)}")
    for key, default in KEYS.items():
        kind = (int, float) if key == "weight" else type(default)
        if not isinstance(tree.get(key, default), kind) or isinstance(tree.get(key), bool):
            raise UserError(f"tree: {key} is {tree[key]!r}; it is a {type(default).__name__}")
    tree = KEYS | tree
    branches, used = tree["branches"], set(search.NAME.findall(json.dumps(tree["settings"])))
    if not branches or not tree["settings"] or not tree["versatility"]:
        raise UserError("tree: it holds three objects that are not empty: branches, settings and versatility")
    if tree["keep"] < 1 or tree["weight"] < 0:
        raise UserError(f"tree: keep is {tree['keep']} and weight {tree['weight']}; at least 1 and at least 0")
    _branch(branches, tree["start"], "start")
    for name, nodes in branches.items():
        if not isinstance(nodes, dict) or not nodes:
            raise UserError(f"tree: branch {name!r} is empty; it is an object of nodes")
        for node, own in nodes.items():
            _node(f"{name}.{node}", own, branches, used)
    named = {n for nodes in branches.values() for own in nodes.values() for n in own if n != THEN} | set(tree["parameters"])
    if idle := sorted(named - used):
        raise UserError(f"tree: no setting names the parameter {idle[0]!r}{nearest(idle[0], used)}")
    met = _met(branches, tree["start"], ())
    if idle := [name for name in branches if name not in met]:
        raise UserError(f"tree: no node leads to the branch {idle[0]!r}")
    return tree


def _branch(branches, name, where):
    if name not in branches:
        raise UserError(f"tree: {where} names no branch {name!r}{nearest(name, branches)}")


def _node(where, own, branches, used):
    if not isinstance(own, dict) or "/" in where:
        raise UserError(f"tree: node {where} is {own!r}; it is an object of parameters, and its name has no '/'")
    if THEN in own:
        _branch(branches, own[THEN], f"node {where}")
    if odd := [key for key in own if key != THEN and key not in used]:
        raise UserError(f"tree: node {where} sets {odd[0]!r}, which no setting names{nearest(odd[0], [*used, THEN])}")


def _met(branches, name, above):
    """The branches that are met from ``name`` down; UserError for one that leads back to itself."""
    if name in above:
        raise UserError(f"tree: the branch {name!r} leads back to itself")
    below = [own[THEN] for own in branches[name].values() if THEN in own]
    return {name}.union(*(_met(branches, b, (*above, name)) for b in below))


def children(tree, node=None):
    """The nodes below one (those at the top): ``{"node": "a/b", "values": …, "settings": …, "then": branch or None}``."""
    branch = tree["start"] if node is None else node[THEN]
    place, values = (node["node"] + "/", node["values"]) if node else ("", tree["parameters"])
    out = []
    for name, own in (tree["branches"][branch] if branch else {}).items():
        held = values | {k: v for k, v in own.items() if k != THEN}
        out.append({"node": place + name, "values": held, "settings": search.filled(tree["settings"], held), THEN: own.get(THEN)})
    return out


def _all(tree, node=None):
    for child in children(tree, node):
        yield child
        yield from _all(tree, child)


# What a node forgets


def general(cfg, c):
    """``measure(params) -> loss`` on general text ``c`` (data settings, its validation split), and the base model's own params.

    A decoder's next-token loss, in nats a token; of an encoder the contrastive loss of the halves of each text, which is what a
    sentence encoder was trained for. UserError where a decoder's own head is gone, or where the data are wrong.
    """
    kind = hf.read_config(hf.resolve(cfg["model"]["path"]), "none").kind
    model, params = hf.load(cfg["model"]["path"], head="lm" if kind == "decoder" else "pooled")
    if kind == "decoder" and cfg["objective"] != "causal_lm" and not model.config.tie_embeddings:
        raise UserError("tree: versatility of a decoder is its next-token loss, and this run's head stands in place of the one for it")
    tok, size = tokenizer.load(hf.resolve(cfg["model"]["path"])), cfg["eval"]["batch_size"]
    c = pipeline.settings({"append_eos": False, **c})
    if kind == "decoder":
        held = pipeline.eval_batches(pipeline.build(c, "validation", tok, "causal_lm", model.config.vocab_size), size)
        return lambda p: forgetting.perplexity(model.apply, p, held, label="versatility")["loss"], jax.device_get(params)
    source = pipeline.source_of(c, "validation")
    texts = [examples.text_of(source[i], c["text_field"], source.where(i)) for i in pipeline.subset(len(source), c["eval_limit"])]
    pairs = forgetting.pair_batches([t for t in texts if len(t.split()) > 1], lambda t: tok.encode_batch(t, max_length=c["max_length"]),
                                    batch_size=size, length=c["max_length"], pad_id=tok.pad_id)  # fmt: skip
    return lambda p: forgetting.contrastive_loss(model.apply, p, pairs, label="versatility")["loss"], jax.device_get(params)


# The search


def search_tree(config, tree, workdir):
    """Goes down the tree from the ``keep`` best nodes of every level; returns the rows of all nodes visited, in order.

    Speciality is what the config evaluates by (a loss with its sign turned), forgetting the rise of the loss on general text
    over the base model's; score = speciality - weight · forgetting. The paper adds scores of benchmarks instead. A second call
    goes on: what ran is not run again, and a node that was cut short resumes. A node that diverges is a row with ``failed``.
    Raises UserError before any run for a wrong tree, or a node anywhere in it whose config is at fault or trains nothing.
    """
    tree = check(tree)
    metric = _dry(config, tree)
    first = search.config_of(config, children(tree)[0]["settings"])
    measure, base = general(train.ready(first), tree["versatility"])
    with search.opened(workdir, {"config": config, "tree": tree}) as workdir:
        before = _measured(workdir / "base.json", functools.partial(measure, base))
        del base
        rows = _descend(tree, workdir, metric, before, lambda node: _visit(node, config, workdir, metric, measure, before, tree["weight"]))
    if all("failed" in row for row in rows):
        raise UserError(f"none of {len(rows)} nodes succeeded; the first: {rows[0]['failed']}")
    return rows


def _descend(tree, workdir, metric, before, visit):
    """The rows of every node visited, level by level."""
    rows, level = [], children(tree)
    while level:
        for node in tqdm(level, desc=f"level {level[0]['node'].count('/') + 1}", unit="node"):
            rows.append(visit(node))
            write(rows, workdir, metric, before)
        best = sorted((r for r in rows[-len(level) :] if "score" in r), key=lambda r: -r["score"])[: tree["keep"]]
        for row in best:
            row["kept"] = True
        level = [child for node in level if node["node"] in {r["node"] for r in best} for child in children(tree, node)]
    write(rows, workdir, metric, before)
    return rows


def _dry(config, tree):
    """The metric of all nodes' configs; UserError, which names the node, for one that cannot be trained."""
    metrics, bases = {}, {}  # a base is read once for all nodes that start from it
    for node in _all(tree):
        try:
            cfg = train.ready(search.config_of(config, node["settings"]))
            key = json.dumps(cfg["model"], sort_keys=True)
            bases[key] = bases.get(key) or recipe.load(cfg["model"], jax.random.key(0))
            train.prepare(cfg, base=bases[key], dry=True)
        except UserError as error:
            raise UserError(f"tree: node {node['node']}: {error}") from None
        metrics.setdefault(cfg["eval"]["metric"], node["node"])
    if len(metrics) > 1:
        raise UserError(f"tree: nodes {' and '.join(metrics.values())} are evaluated by {' and '.join(metrics)}; it is one metric for all")
    return next(iter(metrics))


def _measured(file, measure):
    if not file.exists():
        files.write_json(file, {"loss": measure()})
    return files.read_json(file)["loss"]


def _visit(node, config, workdir, metric, measure, before, weight):
    row = {**{k: node[k] for k in ("node", "values", "settings")}, "run": search.folder_of(node["settings"])}
    folder = workdir / row["run"]
    try:
        summary = train.train(search.config_of(config, node["settings"]), folder, label=node["node"])
    except UserError as error:
        return row | {"failed": str(error)}
    # On the host, as the base's are read: a jitted function that has seen one tree is not compiled again for the next.
    now = _measured(folder / "versatility.json", lambda: measure(jax.device_get(kernels.merge(runs.load_run(folder)[1]))))
    special = summary[f"best_{metric}"] * (1 if metric == "accuracy" else -1)
    return row | {"size": summary["moving_parameters"], "speciality": special, "general_loss": now, "forgetting": now - before,
                  "score": special - weight * (now - before)}  # fmt: skip


def write(rows, workdir, metric, before):
    """results.jsonl, chosen.json and index.html anew: all nodes visited, and the path to the one of the highest score."""
    files.write(workdir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    done = [row for row in rows if "score" in row]
    best = max(done, key=lambda r: r["score"], default=None)
    names = best["node"].split("/") if best else []
    path = ["/".join(names[: i + 1]) for i in range(len(names))]
    files.write_json(workdir / "chosen.json", {"metric": metric, "base_loss": before, "path": path, "node": best})
    shown = [row | {"node": report.text(row["node"], "b") if row["node"] in path else row["node"]} for row in done]
    columns = [("node", "node"), ("size", "weights"), ("speciality", "speciality"), ("general_loss", "loss, general text"),
               ("forgetting", "forgetting"), ("score", "score")]  # fmt: skip
    caption = f"Every node visited, the chosen path in bold. Speciality: {metric}. Before training the loss on general text is {before:.4f}."
    sections = [("Nodes", [report.table(shown, columns, caption)])]
    if failed := [row for row in rows if "failed" in row]:
        sections.append(("Failed nodes", [report.table(failed, [("node", "node"), ("failed", "why")])]))
    report.write(workdir / "index.html", report.page("Where to train", sections, " → ".join(path)))
