"""The registry: what may enter it, and what every method in it must say of itself."""

import inspect

import pytest

from ft_jax import registry
from ft_jax.errors import UserError

METHODS = registry.methods()


@pytest.fixture
def register(monkeypatch):
    """``register`` into a copy that is thrown away."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    return registry.register


def _documented(*, rate=0.5, steps=3, name="x", schedule=None):
    """One line."""
    return rate, steps, name, schedule


def test_a_registered_function_is_found_with_its_hyperparameters(register):
    assert register("merge", "nought", paper="none")(_documented) is _documented
    found = registry.get("merge", "nought")
    assert (found.summary, found.paper) == ("One line.", "none")
    assert found.hyperparameters == {"rate": 0.5, "steps": 3, "name": "x", "schedule": None}
    assert found in registry.methods("merge") and found not in registry.methods("edit")
    assert registry.call("merge", "nought", rate=1, schedule=abs) == (1, 3, "x", abs)


def test_duplicates_unknown_kinds_and_missing_docstrings_raise(register):
    register("merge", "nought", paper="none")(_documented)
    with pytest.raises(ValueError, match="merge 'nought' is registered twice: .*test_registry and .*test_registry"):
        register("merge", "nought", paper="none")(_documented)
    register("edit", "nought", paper="none")(_documented)  # another kind is another method
    with pytest.raises(ValueError, match="unknown kind 'kernal' for 'x'; nearest: 'kernel'"):
        register("kernal", "x", paper="none")(_documented)
    with pytest.raises(ValueError, match="merge 'bare' has no docstring"):
        register("merge", "bare", paper="none")(lambda: None)
    with pytest.raises(ValueError, match="kernel 'odd': no trait 'plane'; nearest: 'plain'"):
        register("kernel", "odd", paper="none", plane=True)(_documented)


def test_traits_have_defaults(register):
    register("kernel", "odd", paper="none", plain=True)(_documented)
    assert registry.get("kernel", "odd").traits == registry.TRAITS["kernel"] | {"plain": True}


@pytest.mark.parametrize(
    "name, hp, message",
    [
        ("lroa", {}, "no kernel called 'lroa'; nearest: 'lora'"),
        ("lora", {"rnak": 8}, "kernel 'lora' has no parameter 'rnak'; nearest: 'rank'"),
        ("lora", {"rank": "eight"}, "kernel 'lora': rank is 'eight'; it takes a value of type int, such as 8"),
        ("lora", {"rank": 2.5}, "kernel 'lora': rank is 2.5; it takes"),
        ("lora", {"alpha": True}, "kernel 'lora': alpha is True; it takes a value of type float"),
    ],
)
def test_a_wrong_name_or_hyperparameter_is_one_line_with_the_nearest(name, hp, message):
    with pytest.raises(UserError) as error:
        registry.call("kernel", name, None, None, **hp)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_kind_with_a_room_has_a_method():
    found = {m.kind for m in METHODS}
    assert found <= set(registry.KINDS)
    assert found >= {"kernel", "tap", "mask", "update", "objective", "analysis"}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.kind}-{m.name}")
def test_every_method_says_what_it_is_and_where_it_comes_from(method):
    assert method.summary.strip() and len(method.summary) <= 120
    assert method.summary.endswith((".", ")")), "one sentence on one line"
    assert method.paper.strip()
    assert method.name == method.name.strip() and " " not in method.name
    kinds = {p.kind for p in inspect.signature(method.fn).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, "a config could not check it"
    assert all(v is not inspect.Parameter.empty for v in method.hyperparameters.values()), "defaults are documentation"
