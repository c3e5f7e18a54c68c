"""Errors a person can act on: one line that says what, where, and the nearest right thing."""

import argparse
import difflib
import errno
import functools
import re
import sys


class Stopped(BaseException):
    """A run was told to stop, saved what it had and can be resumed: no failure, and nothing for `except Exception`."""


class UserError(Exception):
    """A mistake in the input, not in the program; printed as one line with exit status 2."""


def nearest(name, options, *, shown=12):
    """Returns ``"; nearest: 'x'"`` for a near miss, else ``"; known: a, b, …"`` (empty without options)."""
    options = [str(o) for o in options]
    close = difflib.get_close_matches(str(name), options, n=3, cutoff=0.5)
    if close:
        # Of equally near ones the one that begins alike: people seldom miss the first letter.
        best = max(close, key=lambda o: (difflib.SequenceMatcher(None, o, str(name)).ratio(), o[:1] == str(name)[:1]))
        return f"; nearest: {best!r}"
    if not options:
        return ""
    rest = ", …" if len(options) > shown else ""
    return "; known: " + ", ".join(sorted(options)[:shown]) + rest


def disk_full(error):
    """Whether an exception, or anything it was raised from, says that no space is left."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return True
        text = str(error)
        if any(t in text for t in ("No space left", "ENOSPC", "File too large", "RESOURCE_EXHAUSTED: Error writing")):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error):
    return " ".join(str(error).split())


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are a ``UserError`` of one line; options are written out in full."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        raise UserError(message + (nearest(unknown.group(1), self._option_string_actions) if unknown else ""))


def cli(main):
    """Wraps a command-line ``main(argv)``: a ``UserError`` or a full disk ends as one line, exit status 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(0)
        except KeyboardInterrupt:
            print("stopped; run the same command again to resume", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if not disk_full(error):
                raise
            where = getattr(error, "filename", None) or "the output folder"
            print(f"error: no space left on the disk while writing {where}; what was saved before is intact: "
                  "free some space and run the same command again", file=sys.stderr)
        sys.exit(2)

    return wrapped
