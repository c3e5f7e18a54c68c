"""Prompts for the bundled tasks: a template and a label word for each class, for encoders and for decoders.

Those of encoders follow arXiv:2302.06600 and arXiv:2012.15723 (``[MASK]`` is where the label word belongs); those of
decoders end where the label word is the next token. Fields in the templates are those of the tasks' rows.
"""

from ft_jax.data import tasks
from ft_jax.errors import UserError, nearest

KINDS = ("encoder", "decoder")
# kind of task -> template for each kind of model
TEMPLATES = {
    "sentiment": ("{text} It was [MASK].", "Text: {text}\nSentiment:"),
    "inference": ("{text} ? [MASK] , {pair}", "{text}\nQuestion: {pair} Yes or No?\nAnswer:"),
    "paraphrase": ("{text} [MASK] , {pair}", "{text}\n{pair}\nDo these two say the same? Yes or No?\nAnswer:"),
    "question": ("{passage} {asked} [MASK].", "{passage}\nQuestion: {asked} Yes or No?\nAnswer:"),
    "topic": ("[MASK] : {text}", "Article: {text}\nSection:"),
    "subject": ("[MASK] : {text}", "Question: {text}\nSubject:"),
}
_RATED = ("sentiment", ("terrible", "great"), ("negative", "positive"))
# task -> kind of task, label words in the order of its classes; a second row where decoders take others
PROMPTS = {
    **dict.fromkeys(("imdb", "rotten_tomatoes", "sst2", "vader_tweets", "vader_amazon", "vader_nyt"), _RATED),
    "bbc": ("topic", ("business", "entertainment", "politics", "sports", "technology")),
    "subjects": ("subject", ("science", "law", "society", "health")),
    "rte": ("inference", ("Yes", "No")),
    "cb": ("inference", ("Yes", "No", "Maybe")),
    "mrpc": ("paraphrase", ("No", "Yes")),
    "boolq": ("question", ("Yes", "No")),
}


def settings(task, kind, **more):
    """Data settings for prompted classification on a bundled task with an ``encoder`` or a ``decoder``."""
    if task not in PROMPTS:
        raise UserError(f"no prompt for the data {task!r}{nearest(task, PROMPTS)}")
    if kind not in KINDS:
        raise UserError(f"a prompt is for an encoder or a decoder, not for {kind!r}")
    what, *words = PROMPTS[task]
    prompt = {"template": TEMPLATES[what][KINDS.index(kind)], "label_words": words[-1 if kind == "decoder" else 0]}
    return {**tasks.settings(task), "pair_field": "", **prompt, **more}
