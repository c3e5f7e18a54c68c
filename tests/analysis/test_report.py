"""The report page: escaping, number formats, figures that need nothing from outside."""

import html.parser
import re

import numpy as np
import pytest

from ft_jax.analysis import report

VOID = {"meta", "br"}


class Checker(html.parser.HTMLParser):
    """Fails on unbalanced tags, duplicate ids, and anything that would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.uses = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "iframe", "img"), tag
        self.ids += [attrs["id"]] if "id" in attrs else []
        for key, value in attrs.items():
            if key.endswith("href"):
                assert value.startswith("#"), value
                self.uses.append(value[1:])
            self.uses += re.findall(r"url\(#([^)]*)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(markup):
    checker = Checker()
    checker.feed(markup)
    assert checker.open == [] and len(set(checker.ids)) == len(checker.ids)
    assert set(checker.uses) <= set(checker.ids)
    assert "http" not in markup and "@import" not in markup
    return checker


def line_figure():
    fig, ax = report.new_figure(height=2)
    ax.plot([0, 1, 2], [1, 0, 2], label="<full> & \"co\"")
    ax.legend()
    ax.set_xlabel("steps")
    return fig


@pytest.mark.parametrize("value,spec,shown", [
    (85054464, None, "85,054,464"), (0.8745, ".1%", "87.5%"), (None, None, "–"), (float("nan"), ".2f", "–"),
    (-1.5, None, "−1.500"), (0.0, None, "0"), (3.2e-7, None, "3.20 × 10<sup>−7</sup>"), (float("inf"), None, "∞"),
    (2.5e9, None, "2.50 × 10<sup>9</sup>"), (True, None, "yes"), (np.float32(12.3456), None, "12.35"),
    (np.int64(1200), None, "1,200"), ("<b>", None, "&lt;b&gt;"),
])
def test_numbers(value, spec, shown):
    assert report.number(value, spec) == shown


def test_page_is_self_contained_and_escaped():
    rows = [{"name": "<script>alert(1)</script>", "loss": 0.5}, {"name": "a&b", "loss": 12.25}]
    fig, ax = report.new_figure(height=2)
    report.heatmap(ax, np.array([[1.0, np.nan], [0.0, 3.0]]), x=["0", "1"], y=["q", "k"], label="count", annotate=".0f")
    markup = report.page("A <title>", [
        ("One & two", ["plain <i>text</i>", report.table(rows, ["name", ("loss", "Loss / nat")], caption="T < 1")]),
        (None, [report.figure(line_figure(), 'the "caption" \\1'), report.figure(fig, "heat"),
                report.details("more <b>", report.table(rows, ["name"]))]),
    ], subtitle="x < y")
    check(markup)
    assert "<script" not in markup and "&lt;script&gt;" in markup and "<i>text" not in markup
    assert "prefers-color-scheme: dark" in markup and 'name="viewport"' in markup
    assert ">0.50<" in markup and ">12.25<" in markup


def test_figures_take_the_text_colour():
    svg = report.figure(line_figure(), "c")
    assert "#000000" not in svg and "currentColor" in svg and "#ffffff" not in svg
    assert ">steps</text>" in svg and "&lt;full&gt; &amp;" in svg


def test_a_heatmap_takes_a_corner_pair_a_cell():
    """Every cell is drawn, edge to edge, to a hundredth of a point."""
    fig, ax = report.new_figure(3, 2)
    report.heatmap(ax, np.arange(12.0).reshape(3, 4), x=list("abcd"), y=list("uvw"), label="value")
    cells = re.findall(r'd="M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H\1z" clip-path', report.figure(fig, "cells"))
    boxes = np.array(cells[:12], float).reshape(3, 4, 4)
    np.testing.assert_allclose(boxes[:, 1:, 0], boxes[:, :-1, 2], atol=1e-9)
    np.testing.assert_allclose(boxes[1:, :, 1], boxes[:-1, :, 3], atol=1e-9)
    assert (boxes[..., 2] - boxes[..., 0] > 10).all() and (boxes[..., 3] - boxes[..., 1] > 10).all()


def test_floats_of_a_column_share_their_decimals():
    assert re.findall(r"<td class=n>([^<]*)</td>", report.table([{"a": 0.5}, {"a": 12.25}, {}], ["a"])) == [
        "0.50", "12.25", "–"]


def test_write_replaces_whole_files_only(tmp_path):
    report.write(tmp_path / "r.html", report.page("é", []))
    assert (tmp_path / "r.html").read_text("utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
