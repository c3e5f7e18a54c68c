"""Source archives from the indexes that pip is set to, fetched without pip: pip would run their setup code."""

import html.parser
import http.client
import json
import os
import pathlib
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request

from ft_jax.errors import UserError, one_line

ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.2"  # PEP 691, else PEP 503
ATTEMPTS = 3


def fetch(project, filename, folder, limit):
    """Writes the file called ``filename`` of a project into ``folder``: not unpacked, nothing of it run.

    Looks where pip looks (find-links, index-url, extra-index-url, no-index, cert of its settings), in this order; the
    caller checks the hash. UserError when no place has the file or it takes more than ``limit`` bytes.
    """
    given, said = _pip_settings(), []
    links = given.get("find-links", "").split()
    if given.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    else:
        first = given.get("index-url") or _standard()
        indexes = [*([first] if first else []), *given.get("extra-index-url", "").split()]
    pages = [*links, *(f"{url.rstrip('/')}/{re.sub(r'[-_.]+', '-', project).lower()}/" for url in indexes)]
    for page in pages:
        try:
            if url := _find(_url(page), filename, given.get("cert")):
                data = _get(url, given.get("cert"), limit)[0]
                break
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            said.append(one_line(error))
    else:
        cause = said[-1] if said else "no place has it"
        raise UserError(f"{filename} of {project} could not be fetched ({cause}); check the network and pip's index settings, "
                        "or put the file into a folder that PIP_FIND_LINKS names")
    (pathlib.Path(folder) / filename).write_bytes(data)


def _pip_settings():
    """``{name: value}`` of pip's configuration: its environment before ``[download]`` before ``[global]``."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    found = re.findall(r"^(:env:|global|download)\.([\w-]+)=(['\"])(.*)\3$", done.stdout, re.MULTILINE)
    order = {"global": 0, "download": 1, ":env:": 2}
    return {name: value.replace("\\n", " ") for _, name, _, value in sorted(found, key=lambda row: order[row[0]])}


def _standard():
    """The index that pip looks in unless its settings name another, as its help says it; None where it says none."""
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--help"], capture_output=True, text=True, check=False,
                          env=os.environ | {"COLUMNS": "300"})  # fmt: skip
    found = re.search(r"--index-url\b[^()]*\(default\s+(\S+?)\)", done.stdout)
    return found and found[1]


def _url(place):
    return place if "://" in place else pathlib.Path(place).expanduser().absolute().as_uri()


def _find(page, filename, cert):
    """Address of the file that a page of links or a local folder offers, else None."""
    parts = urllib.parse.urlsplit(page)
    if parts.scheme == "file":
        folder = pathlib.Path(urllib.request.url2pathname(parts.path))
        if (folder / filename).is_file():
            return (folder / filename).as_uri()
        if not (folder / "index.html").is_file():
            return None
        page = (folder / "index.html").as_uri()
    data, kind, page = _get(page, cert, 50_000_000)
    if kind.endswith("+json"):
        urls = [file["url"] for file in json.loads(data)["files"]]
    else:
        urls = _links(data.decode("utf-8", "replace"))
    for url in urls:
        if urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2]) == filename:
            return urllib.parse.urljoin(page, url)
    return None


def _links(text):
    found = []

    class Links(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend(value for key, value in attrs if tag == "a" and key == "href" and value)

    Links().feed(text)
    return found


def _get(url, cert, limit):
    """``(bytes, kind, final address)``."""
    if urllib.parse.urlsplit(url).scheme not in ("https", "http", "file"):
        raise ValueError(f"{url} is no address that is fetched from")
    context = ssl.create_default_context(cafile=os.path.expanduser(cert) if cert else None)
    request, left = urllib.request.Request(url, headers={"Accept": ACCEPT}), ATTEMPTS
    while True:
        left -= 1
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as response:
                data = response.read(limit + 1)
                break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) or not left:
                raise
    if len(data) > limit:
        raise UserError(f"{url} is larger than {limit / 1e6:.0f} MB: not the pinned file")
    return data, response.headers.get_content_type(), response.geturl()
