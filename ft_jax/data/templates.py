"""Prompts for the bundled tasks: a template and a label word for each class, for encoders and for decoders.

Those of encoders follow arXiv:2302.06600 and arXiv:2012.15723 (``[MASK]`` is where the label word belongs); those of
decoders end where the label word is the next token. Fields in the templates are those of the tasks' rows.
"""

from ft_jax.data import tasks
from ft_jax.errors import UserError, nearest

# kind of task -> kind of model -> template
TEMPLATES = {
    "sentiment": {"encoder": "{text} It was [MASK].", "decoder": "{text} It was"},
    "inference": {"encoder": "{text} ? [MASK] , {pair}", "decoder": "{text}\nQuestion: {pair} Yes or No?\nAnswer:"},
    "paraphrase": {"encoder": "{text} [MASK] , {pair}", "decoder": "{text}\n{pair}\nDo these two say the same? Yes or No?\nAnswer:"},
    "question": {"encoder": "{passage} {asked} [MASK].", "decoder": "{passage}\nQuestion: {asked} Yes or No?\nAnswer:"},
    "topic": {"encoder": "[MASK] : {text}", "decoder": "{text}\nTopic:"},
}
_SENTIMENT = ("sentiment", ("terrible", "great"))
# task -> (kind, label words in the order of its classes)
PROMPTS = {
    "imdb": _SENTIMENT,
    "rotten_tomatoes": _SENTIMENT,
    "sst2": _SENTIMENT,
    "vader_tweets": _SENTIMENT,
    "vader_amazon": _SENTIMENT,
    "vader_nyt": _SENTIMENT,
    "bbc": ("topic", ("business", "entertainment", "politics", "sports", "technology")),
    "subjects": ("topic", ("science", "law", "society", "health")),
    "rte": ("inference", ("Yes", "No")),
    "cb": ("inference", ("Yes", "No", "Maybe")),
    "mrpc": ("paraphrase", ("No", "Yes")),
    "boolq": ("question", ("Yes", "No")),
}


def settings(task, kind, **more):
    """Data settings for prompted classification on a bundled task with an ``encoder`` or a ``decoder``."""
    if task not in PROMPTS:
        raise UserError(f"no prompt for the data {task!r}{nearest(task, PROMPTS)}")
    if kind not in ("encoder", "decoder"):
        raise UserError(f"a prompt is for an encoder or a decoder, not for {kind!r}")
    what, words = PROMPTS[task]
    return {**tasks.settings(task), "pair_field": "", "template": TEMPLATES[what][kind], "label_words": words, **more}
