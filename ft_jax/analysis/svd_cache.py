"""Left singular vectors of base matrices, kept on disk under the hash of the matrix's content.

Files lie in ``assets.cache_dir()/svd``. Together they take at most ``$FT_JAX_SVD_CACHE_GB`` (8; 0 keeps nothing): the
ones unused for longest go first. A file that is cut off or changed is computed again.
"""

import contextlib
import hashlib
import os
import time

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ft_jax.analysis import spectral
from ft_jax.errors import UserError
from ft_jax.io import assets, files

_VERSION = b"1"  # of the way the vectors are computed


def limit_bytes():
    """``$FT_JAX_SVD_CACHE_GB`` in bytes."""
    text = os.environ.get("FT_JAX_SVD_CACHE_GB", "8")
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise UserError(f"FT_JAX_SVD_CACHE_GB={text!r}: a number of gigabytes is expected, 0 for no cache")
    return int(size * 1e9)


def folder():
    return assets.cache_dir() / "svd"


def key(w):
    """SHA-256 of shape and float32 content."""
    turned = w.flags.f_contiguous and not w.flags.c_contiguous  # hashed as it lies: a copy costs more than the hash
    digest = hashlib.sha256(_VERSION + f"{turned}{w.shape}".encode())
    digest.update(np.ascontiguousarray(w.T if turned else w).data)
    return digest.hexdigest()


def left(w):
    """``(U0ᵀ [n, d_out], σ [n])`` of a float32 ``[d_in, d_out]`` matrix, float32, largest first; from disk or computed."""
    if not limit_bytes():
        return spectral.left_vectors(w)
    path = folder() / f"{key(w)}.safetensors"
    found = _read(path, w.shape)
    if found is None:
        found = spectral.left_vectors(w)
        _write(path, *found)
    return found


def _read(path, shape):
    n = min(shape)
    try:
        with safe_open(path, framework="np") as file:
            said = (file.metadata() or {}).get("sha256")
            vectors, sigma = file.get_tensor("left"), file.get_tensor("sigma")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError):
        return None  # cut off or no such file format: computed again and replaced
    if vectors.shape != (n, shape[1]) or sigma.shape != (n,) or _sum(vectors, sigma) != said:
        return None
    _used(path)
    return vectors, sigma


def _used(path):
    now = time.time_ns()  # the file system's own clock is too coarse to tell which of two files was used last
    with contextlib.suppress(FileNotFoundError):  # another process made room
        os.utime(path, ns=(now, now))


def _sum(vectors, sigma):
    digest = hashlib.sha256(np.ascontiguousarray(sigma).data)
    digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()


def _write(path, vectors, sigma):
    limit = limit_bytes()
    if vectors.nbytes > limit:
        return
    files.make_folder(path.parent)
    with files.replacing(path) as temporary:
        save_file({"left": vectors, "sigma": sigma}, temporary, metadata={"sha256": _sum(vectors, sigma)})
    _used(path)
    _trim(limit)


def _trim(limit):
    held = []
    for path in folder().glob("*.safetensors"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process made room
            continue
        if path.name.startswith(".") and time.time() - stat.st_mtime < 3600:  # one that is being written
            continue
        held.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in held)
    for _, size, path in sorted(held):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size
