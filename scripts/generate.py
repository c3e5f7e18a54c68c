"""Says what a model, a run or a PEFT adapter says.

python scripts/generate.py --model=smollm2 --chat --prompt='What is the capital of France?' [--adapter=DIR]
python scripts/generate.py --workdir=RUN --prompt='The film was' --temperature=0.8 --top_p=0.95 --max_new_tokens=64
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ft_jax import errors, sampling
from ft_jax.errors import UserError
from ft_jax.io import hf, peft, runs, tokenizer


def opened(args):
    """(model, params, tokenizer) of --workdir, or of --model with --adapter."""
    if bool(args.model) == bool(args.workdir):
        raise UserError("give --model or --workdir, one of them")
    if args.workdir:
        if args.adapter:
            raise UserError("--adapter goes with --model; a run has its own")
        model, params, recipe = runs.load_run(args.workdir, args.which)
        return model, params, tokenizer.load(hf.resolve(recipe["model"]["path"]))
    model, params = hf.load(args.model, head="lm")
    if args.adapter:
        params = peft.load_adapter(args.adapter, model, params)
    return model, params, tokenizer.load(hf.resolve(args.model))


@errors.cli
def main(argv=None):
    parser = errors.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder, .gguf file, asset or hf:org/name")
    parser.add_argument("--adapter", help="folder of a PEFT adapter for --model")
    parser.add_argument("--workdir", help="folder of a run")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of the run (best)")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; several are one batch")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's turn, in the model's own form")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    model, params, tok = opened(args)
    texts = args.prompt
    if args.chat:
        texts = [tok.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True) for text in texts]
    ids = tok.encode_batch(texts, add_special_tokens=not args.chat)  # a template writes its own
    ends = () if tok.eos_id is None else (tok.eos_id,)
    found = sampling.generate(model, params, ids, max_new_tokens=args.max_new_tokens, ends=ends, temperature=args.temperature, top_k=args.top_k,
                              top_p=args.top_p, seed=args.seed)  # fmt: skip
    for prompt, row in zip(args.prompt, found, strict=True):
        print(f"{prompt}\n  {tok.decode(row, skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    main()
