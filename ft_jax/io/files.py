"""Small files: JSON read with a plain error, anything written whole or not at all."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import secrets
import socket

from ft_jax.errors import UserError, nearest

LOCK, TEMPORARY = "LOCK", ".tmp-"
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def read_json(path):
    """The JSON object in a file; UserError when it is missing, unreadable or no object."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path.parent}: {path.name} is missing{nearest(path.name, entries(path.parent))}")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def local(path, what="workdir"):
    """``path`` as a Path; UserError for a URL (gs://…), of which a Path would make a local folder without a word."""
    if re.match(r"[a-zA-Z][\w+.-]*:/", str(path)):
        raise UserError(f"{what} {str(path)!r} is a URL; runs write local files: mount the bucket (gcsfuse) or a shared disk and "
                        "give its folder, see docs/scale.md")
    return pathlib.Path(path)


def entries(folder):
    """Names in a folder, sorted; empty when it is no folder."""
    try:
        return sorted(p.name for p in pathlib.Path(folder).iterdir())
    except (OSError, ValueError):
        return []


def write_json(path, value):
    write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def write(path, data):
    """Puts bytes at ``path`` through a temporary name in the same folder."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path):
    """A temporary name beside ``path`` that takes its place when the block ends well, and else disappears."""
    path = pathlib.Path(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path):
    """An unused hidden name beside ``path``."""
    path = pathlib.Path(path)
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def strangers(folder):
    """Names in a folder but its lock and what a process that was killed left half written."""
    return [name for name in entries(folder) if name != LOCK and not name.startswith(TEMPORARY)]


def sweep(folder):
    """Removes what a killed process left half written; for the one that holds the folder's lock."""
    for name in entries(folder):
        if name.startswith(TEMPORARY):
            (pathlib.Path(folder) / name).unlink(missing_ok=True)


def lock(folder):
    """Takes a folder until `unlock` or the process's end, however it comes; UserError while another process has it."""
    path = pathlib.Path(folder) / LOCK
    while True:
        try:
            file = open(path, "a+")  # noqa: SIM115 (held until unlock)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            raise UserError(f"{folder}: may not be written; name another folder") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"workdir {folder} is in use by {file.read().strip() or 'another process'}; "
                            "wait for it, stop it, or choose another --workdir") from None
        except OSError:  # a file system without locks
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # its owner removed it in between: this one locks nothing
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def unlock(folder, file):
    (pathlib.Path(folder) / LOCK).unlink(missing_ok=True)
    file.close()


def make_folder(path):
    """Creates a folder with its parents; UserError when a file stands in the way, it may not be written, or it is a URL."""
    path = local(path, "folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: a file stands where a folder is to be written; name another folder") from None
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        raise UserError(f"{path}: may not be written; name another folder") from None
    return path
