"""Which few parameters hold what fine-tuning taught (arXiv:2302.06600): learns a graft and puts it on the base.

python scripts/graft.py --workdir=RUN --sparsity=0.01 --out=DIR [--save-model]
python scripts/graft.py --base=DIR --tuned=DIR --data=SOURCE --sparsity=0.01 --out=DIR [--settings='{"max_length": 64}']

Writes graft.json and mask.safetensors, with --save-model also the grafted checkpoint under DIR/model. Learns on the
training split, selects and measures on validation. Finished output is not computed again.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from tqdm.auto import tqdm

from ft_jax import errors, kernels, masks, train, tree
from ft_jax.analysis import predictions
from ft_jax.data import pipeline
from ft_jax.errors import UserError
from ft_jax.io import files, hf, runs, tokenizer
from ft_jax.objectives import inputs_of
from ft_jax.weights import graft

OBJECTIVES = {"classification": "classification", "prototype": "classification", "label_words": "classification",
              "lm": "causal_lm"}  # by head  # fmt: skip
HEADS = ("head/", "pooler/")


def arguments(argv):
    parser = errors.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="a finished run; its config names base and data")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of the run (best)")
    parser.add_argument("--base", help="the pretrained model, where there is no run")
    parser.add_argument("--tuned", help="the fine-tuned model")
    parser.add_argument("--data", help="data source, as in configs/train.py")
    parser.add_argument("--settings", default="{}", help="more data settings, as JSON")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--sparsity", type=float, default=0.01, help="share of the layers' parameters (0.01)")
    parser.add_argument("--steps", type=int, default=10, help="steps of learning the mask (10)")
    parser.add_argument("--examples", type=int, default=1024, help="training examples a step (1024)")
    parser.add_argument("--micro", type=int, default=32, help="examples at once (32)")
    parser.add_argument("--learning-rate", type=float, default=1e7, help="step size on the mask's logits (1e7)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-model", action="store_true", help="also write the grafted checkpoint")
    args = parser.parse_args(argv)
    pair = [args.base, args.tuned, args.data]
    if not (all(pair) and not args.workdir) and not (args.workdir and not any(pair)):
        raise UserError("give either --workdir, or --base, --tuned and --data")
    if not 0 < args.sparsity <= 1:
        raise UserError(f"--sparsity {args.sparsity} is not a share above 0 and up to 1")
    if args.micro < 1 or args.steps < 0 or args.examples < 1 or args.examples % args.micro:
        raise UserError(f"--examples {args.examples} must be a multiple of --micro {args.micro}, and --steps not negative")
    return args


def of_run(args):
    """(data settings, model, base folder, base, tuned) of a finished run."""
    workdir = pathlib.Path(args.workdir)
    if (workdir / "config.json").is_file() and not (workdir / "DONE").is_file():
        raise UserError(f"{workdir}: the run is not finished; call its training command again")
    model, params, recipe = runs.load_run(workdir, args.which)
    folder = hf.resolve(recipe["model"]["path"])
    _, base = hf.load(folder, head=model.config.head, num_labels=model.config.num_labels, label_ids=model.config.label_ids)
    data = files.read_json(workdir / "config.json")["data"]
    return data, model, folder, base, masks.join_layers(jax.jit(kernels.merge)(params))


def of_folders(args):
    """The same of two model folders and a data source."""
    folder = hf.resolve(args.tuned)
    model, tuned = hf.load(folder)
    _, base = hf.load(args.base, head=model.config.head, num_labels=model.config.num_labels, label_ids=model.config.label_ids)
    try:
        data = {"num_labels": model.config.num_labels, **json.loads(args.settings), "source": args.data}
    except (ValueError, TypeError) as error:
        raise UserError(f"--settings {args.settings!r} is no JSON object: {error}") from None
    return data, model, folder, base, tuned


def load(args):
    """(data settings, model, tokenizer's folder, base with the tuned model's head, tuned, what was done about it)."""
    data, model, folder, base, tuned = of_run(args) if args.workdir else of_folders(args)
    if model.config.head not in OBJECTIVES:
        raise UserError(f"a graft needs a model with head {', '.join(OBJECTIVES)}, not {model.config.head!r}")
    first, second = tree.flatten(base), tree.flatten(tuned)
    other = [p for p in first if p in second and not np.array_equal(first[p], second[p])]
    heads = [p for p in other if p.startswith(HEADS)]
    note = {
        "head": f"the tuned model's on base and graft, for {', '.join(heads)} were trained" if heads else "the base's own",
        "left_at_base": [p for p in other if p not in heads and not p.startswith("layers/")],
    }
    base = tree.nest({**first, **{p: second[p] for p in heads}})
    return data, model, folder, *jax.device_put((base, tuned), jax.devices()[0]), note


def learn(args, objective, model, base, tuned, data, score):
    """(mask, history): the graft learnt on the training split, the candidate with the best score."""
    loss = train.make_objective({"objective": objective, "model": {"dropout": False}, "data": data["settings"]},
                                model, data["tokenizer"])  # fmt: skip
    batches = pipeline.prefetch(pipeline.batches(data["train"], args.examples, args.seed))
    micro = ({k: v.reshape(-1, args.micro, *v.shape[1:]) for k, v in batch.items()} for batch in batches)
    return graft.learn_mask(
        base, tuned, lambda params, batch: loss(params, batch, None)[0], micro, score,
        sparsity=args.sparsity, steps=args.steps, learning_rate=args.learning_rate, seed=args.seed,
    )  # fmt: skip


def where(mask):
    """Parameters of the mask and their share, by layer and by kind of matrix."""
    sizes = {row["path"]: mask[row["path"]][0].size for row in graft.mask_shares(mask)}
    by_layer, by_matrix = {}, {}
    for row in graft.mask_shares(mask):
        for table, key in ((by_layer, row["layer"]), (by_matrix, row["path"].removeprefix("layers/"))):
            count, total = table.get(key, (0, 0))
            table[key] = count + row["parameters"], total + sizes[row["path"]]
    return {
        name: [{name: key, "parameters": count, "share": count / total} for key, (count, total) in table.items()]
        for name, table in (("layer", by_layer), ("matrix", by_matrix))
    }


def compute(args, settings, model, folder, base, tuned, note):
    """(report, mask)."""
    objective, tok = OBJECTIVES[model.config.head], tokenizer.load(folder)
    data = {split: pipeline.build(settings, split, tok, objective, model.config.vocab_size)
            for split in ("train", "validation")} | {"settings": pipeline.settings(settings), "tokenizer": tok}  # fmt: skip
    files.make_folder(args.out)
    predict = predictions.predictor(lambda params, batch: model.apply(params, inputs_of(batch)), objective)

    def found(params, label=None):
        batches = pipeline.eval_batches(data["validation"], args.micro)
        return predict(params, tqdm(batches, desc=label, unit="batch", leave=False, disable=label is None))

    def score(params):
        got = predictions.scores(found(params))
        return got["accuracy"] if objective == "classification" else -got["loss"]

    mask, history = learn(args, objective, model, base, tuned, data, score)
    count, share = graft.mask_size(mask)
    chance = graft.random_mask(base, share, np.random.default_rng(args.seed))  # as large as the learnt one came out
    measured = {"base": base, "tuned": tuned, "grafted": graft.apply_graft(base, tuned, mask),
                "random": graft.apply_graft(base, tuned, chance)}  # fmt: skip
    reference = found(tuned)
    return {
        "objective": objective, "sparsity": args.sparsity, "sparsity_reached": share, "parameters": count,
        "eligible_parameters": sum(m.size for m in mask.values()), **note,
        "learnt_on": f"train split of {data['train'].name}",
        "selected_and_measured_on": f"validation split of {data['validation'].name}",
        **{name: predictions.scores(found(params, name), reference) for name, params in measured.items()},
        "where": where(mask), "history": history,
    }, mask  # fmt: skip


def _print(report):
    print(f"{report['parameters']} of {report['eligible_parameters']} parameters ({report['sparsity_reached']:.2%})")
    print(f"{'':8} {'accuracy':>9} {'loss':>8} {'ECE':>7} {'agrees':>7}")
    for name in ("base", "tuned", "grafted", "random"):
        s = report[name]
        print(f"{name:8} {s['accuracy']:9.4f} {s['loss']:8.4f} {s['ece']:7.4f} {s['agreement']:7.4f}")
    if len({(row["parameters"], row["score"]) for row in report["history"]}) == 1:
        print("the learning steps changed nothing: this is the magnitude mask; try a --learning-rate of 1e9 to 1e11")


@errors.cli
def main(argv=None):
    args = arguments(argv)
    out = pathlib.Path(args.out)
    asked = {k: v for k, v in vars(args).items() if k not in ("out", "save_model")}
    done, saved = out / "graft.json", out / "model" / "config.json"
    report = files.read_json(done) if done.exists() else None
    difference = report and runs.first_difference(report.get("settings"), asked, "settings")
    if difference:
        raise UserError(f"{done} is another graft: {difference}; choose another --out")
    loaded = None if report and (saved.exists() or not args.save_model) else load(args)
    if not report:
        report, mask = compute(args, *loaded)
        graft.save_mask(out / "mask.safetensors", mask)
        files.write_json(done, {"settings": asked, **report})
    if loaded and args.save_model:
        _, model, folder, base, tuned, _ = loaded
        hf.save(out / "model", model, graft.apply_graft(base, tuned, graft.load_mask(out / "mask.safetensors")), folder)
    _print(report)
    print(done)


if __name__ == "__main__":
    main()
