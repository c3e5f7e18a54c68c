"""Damage to files, as Hypothesis draws it, and the bounds in time and memory that a loader has with them."""

import contextlib
import json
import os
import pathlib
import resource
import signal

from hypothesis import strategies as st

from ft_jax.errors import UserError

SECONDS, BYTES = 20, 3 << 30  # a case may take this long, and this much more address space than the process has (threads take most)
ODD = (None, True, False, -1, 0, 1, 7, 10**12, 2**63, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "", "x", "../x", "/x", "\u0000", "lora(rank=4)",
       [], {}, [[]], [1], ["x"], {"x": 1}, [None], "ä" * 300)  # fmt: skip


def bytes_damaged(data, head):
    """Strategy of ``(how, bytes)``."""
    end = len(data) - 1
    place = st.one_of(st.integers(0, min(head, end)), st.integers(0, end)) if head else st.integers(0, end)

    def changed(how, cells):
        out = bytearray(data)
        for at, new in cells:
            out[at : at + len(new)] = new if how != "flip" else bytes([out[at] ^ (1 << new[0] % 8)])
        return how, bytes(out[: len(data)])

    long = st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x00\x01\x00\x00\x00"])
    flipped = st.lists(st.tuples(place, st.binary(min_size=1, max_size=1)), min_size=1, max_size=3).map(lambda c: changed("flip", c))
    longer = st.one_of(
        st.tuples(place, st.binary(min_size=1, max_size=9)).map(lambda c: ("insert", data[: c[0]] + c[1] + data[c[0] :])),
        st.binary(min_size=1, max_size=20).map(lambda more: ("append", data + more)),
    )
    return st.one_of(
        flipped, flipped, flipped, longer,
        place.map(lambda at: ("cut", data[:at])),
        st.lists(st.tuples(place, st.binary(min_size=1, max_size=4)), min_size=1, max_size=2).map(lambda c: changed("write", c)),
        st.lists(st.tuples(place, long), min_size=1, max_size=1).map(lambda c: changed("write", c)),
    )


def places(value, path=()):
    """The places of a JSON value; of long lists the first few."""
    yield path
    for key in list(value)[:40] if isinstance(value, dict) else range(min(len(value), 4)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def put(value, path, new, drop):
    if not path:
        return new
    out = value.copy()
    if len(path) > 1:
        out[path[0]] = put(value[path[0]], path[1:], new, drop)
    elif drop:
        del out[path[0]]
    else:
        out[path[0]] = new
    return out


def json_damaged(data):
    """Strategy of ``(how, bytes)`` for a JSON text: another value in some place, none, or damage to the bytes."""
    value = json.loads(data)
    draw = st.tuples(st.sampled_from(list(places(value))), st.sampled_from(ODD), st.booleans())
    changed = draw.map(lambda d: ("value", json.dumps(put(value, d[0], d[1], d[2] and bool(d[0]))).encode()))
    deep = st.sampled_from([b"[" * 200_000, b'{"a":' * 100_000, b"", b"null", b"[]", b"\xff\xfe"]).map(lambda text: ("text", text))
    return st.one_of(changed, changed, changed, bytes_damaged(data, 0), deep)


class Slow(BaseException):
    """A case that took longer than it may; no Exception, so that no loader takes it for its own."""


@contextlib.contextmanager
def bounds():
    """A limit on time and on address space beyond what the process has; nothing is printed."""

    def late(*_):
        raise Slow(f"took longer than {SECONDS} s")

    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, hard))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(load, right=lambda loaded: None):
    """``refused``, ``loaded``, or what went wrong."""
    try:
        with bounds():
            loaded = load()
            wrong = right(loaded)
    except UserError as error:
        return "refused" if str(error).strip() else "an empty message"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return f"wrong: {wrong}" if wrong else "loaded"
