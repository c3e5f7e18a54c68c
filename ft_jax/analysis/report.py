"""One self-contained HTML page of tables and figures, for light and dark screens and for paper.

Text given as ``str`` is escaped; only `Html`, which the helpers here return, is put in as it stands.
Figures are inline SVG: whatever matplotlib draws in black takes the colour of the page's text.
"""

import html
import io
import itertools
import math
import numbers
import re

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ft_jax.io import files

PALETTE = ("#3f7fbf", "#d07a2d", "#3d9970", "#b5568c", "#8c8577", "#7a6bc4")  # mid-tones: legible on both grounds
HEAT = LinearSegmentedColormap.from_list("heat", [(0.25, 0.5, 0.75, 0.05), (0.25, 0.5, 0.75, 1.0)], N=64)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ft_jax",  # the same figure is the same bytes
    "font.family": "serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "axes.grid": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
}
_SHEET = """
:root { color-scheme: light dark; --ground: #fdfcf9; --ink: #1c1b1a; --soft: #6a6660; --rule: #cfc9bf; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #161718; --ink: #e3e0da; --soft: #a19c93; --rule: #45423d; }
}
@media print { :root { --ground: #fff; --ink: #000; --soft: #444; --rule: #999; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 17px/1.55 Charter, "Bitstream Charter", "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif; }
main { max-width: 45rem; margin: 0 auto; padding: 3.5rem 1.25rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 600; margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.2rem; font-weight: 600; margin: 2.8rem 0 .6rem; }
h3 { font-size: 1rem; font-weight: 600; font-style: italic; margin: 1.8rem 0 .4rem; }
p { margin: 0 0 .9rem; hyphens: auto; }
.subtitle { color: var(--soft); margin-bottom: 2rem; overflow-wrap: anywhere; }
figure { margin: 1.6rem 0; }
.wide { overflow-x: auto; }
figcaption, caption { font-size: .87rem; line-height: 1.45; color: var(--soft); text-align: left; }
figcaption { margin-top: .5rem; }
caption { caption-side: top; margin-bottom: .5rem; }
figcaption b, caption b { color: var(--ink); font-weight: 600; }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; color: var(--ink); fill: currentColor; }
figure svg text { font-family: inherit !important; }
@media (max-width: 40rem) { figure svg { min-width: 31rem; } body { font-size: 16px; } main { padding-top: 2rem; } }
table { border-collapse: collapse; width: 100%; font-size: .87rem; line-height: 1.35;
  font-variant-numeric: lining-nums tabular-nums;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); }
th { font-weight: 600; text-align: left; vertical-align: bottom; border-bottom: .75px solid var(--ink); }
th, td { padding: .32rem .9rem .32rem 0; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr + tr td { border-top: .5px solid var(--rule); }
.n { text-align: right; }
td.n { white-space: nowrap; }
sup { font-size: .72em; line-height: 0; }
code { font: .88em/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; overflow-wrap: anywhere; }
figure.wide:has(table.sortable) { width: min(94vw, 76rem); margin-left: calc(50% - min(47vw, 38rem)); }
table.sortable th { cursor: pointer; }
th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
details summary { cursor: pointer; color: var(--soft); margin: 1rem 0 .5rem; }
"""


_SORT = """<script>
for (const head of document.querySelectorAll("table.sortable th")) {
  head.tabIndex = 0;
  const value = row => {
    const shown = row.cells[head.cellIndex].textContent.replace("\u2212", "-").replace(/,/g, "");
    return Number.isNaN(parseFloat(shown)) ? shown.toLowerCase() : parseFloat(shown);
  };
  const sort = () => {
    const up = head.getAttribute("aria-sort") !== "ascending", body = head.closest("table").tBodies[0];
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "string" ? 1 : -1);
    const rows = [...body.rows].map(row => [value(row), row]);
    const last = ([v]) => v === "\u2013" || v === "";  // dashes stay below either way
    rows.sort((a, b) => last(a) - last(b) || (up ? 1 : -1) * order(a[0], b[0])).forEach(([, row]) => body.append(row));
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", key => key.key === "Enter" && sort());
}
</script>"""


class Html(str):
    """Markup that is put into a page as it stands."""


def text(value, tag="p", css=None):
    """One escaped element."""
    name = f' class="{css}"' if css else ""
    return Html(f"<{tag}{name}>{_safe(value)}</{tag}>")


def _safe(value):
    return value if isinstance(value, Html) else html.escape(str(value), quote=True)


def number(value, spec=None):
    """A number as print sets it: ``spec`` is a format such as ``.1%``, without it four significant digits."""
    if value is None or (isinstance(value, numbers.Real) and math.isnan(value)):
        return Html("–")
    if not isinstance(value, numbers.Number) or isinstance(value, bool):
        return Html({True: "yes", False: "no"}[value] if isinstance(value, bool) else _safe(value))
    if math.isinf(value):
        return Html("∞" if value > 0 else "−∞")
    if spec:
        shown = format(value, spec)
    elif isinstance(value, numbers.Integral):
        shown = f"{value:,}"
    elif value == 0:
        shown = "0"
    elif not 1e-3 <= abs(value) < 1e6:
        shown = f"{value:.2e}"
    else:
        shown = f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    mantissa, e, exponent = shown.replace("-", "−").partition("e")
    if e:
        power = exponent.replace("+", "").replace("−", "-")
        mantissa += f" × 10<sup>{str(int(power)).replace('-', '−')}</sup>"
    return Html(mantissa)


def _spec(values):
    """One format for a column of floats, so that the points align; None where one format would hide digits."""
    real = [v for v in values if isinstance(v, numbers.Real) and not isinstance(v, bool)]
    sizes = [abs(float(v)) for v in real if math.isfinite(v) and v != 0]
    if not sizes or all(isinstance(v, numbers.Integral) for v in real):
        return None
    decimals = 3 - math.floor(math.log10(max(sizes)))
    if not 0 <= decimals <= 6 or min(sizes) < 10.0 ** (1 - decimals):
        return None
    return f",.{decimals}f"


def table(rows, columns, caption=None, sortable=False):
    """A table: ``rows`` are dicts, ``columns`` keys or ``(key, heading)`` or ``(key, heading, format)``.

    A missing value, None or NaN shows as a dash. Without a format, a column's floats share their decimals. ``sortable``:
    a click on a heading sorts by it, a second one the other way round.
    """
    columns = [(c, c) if isinstance(c, str) else tuple(c) for c in columns]
    head, specs, right = [], {}, {}
    for key, heading, *spec in columns:
        values = [row.get(key) for row in rows]
        given = [v for v in values if v is not None]
        right[key] = bool(given) and all(isinstance(v, numbers.Number) and not isinstance(v, bool) for v in given)
        specs[key] = spec[0] if spec else _spec(given)
        head.append(f'<th scope="col"{" class=n" if right[key] else ""}>{_safe(heading)}</th>')
    body = []
    for row in rows:
        # A narrow column breaks "a ± b" once, not twice.
        cells = (f'<td{" class=n" if right[k] else ""}>{number(row.get(k), specs[k]).replace(" ±", "&nbsp;±")}</td>' for k, *_ in columns)
        body.append(f"<tr>{''.join(cells)}</tr>")
    title = f"<caption>{_safe(caption)}</caption>" if caption else ""
    sort = " class=sortable" if sortable else ""
    return Html(f'<figure class="wide"><table{sort}>{title}<thead><tr>{"".join(head)}</tr></thead>'
                f"<tbody>{''.join(body)}</tbody></table></figure>")


def new_figure(width=6.6, height=3.0, rows=1, columns=1, **options):
    """``(Figure, axes)`` in the page's style, in inches; ``options`` go to ``Figure.subplots``."""
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        return fig, fig.subplots(rows, columns, **options)


def heatmap(ax, values, *, x, y, label, vmax=None, annotate=None):
    """Cells of ``values [len(y), len(x)]`` with their colour bar; NaN stays empty. ``annotate`` is a cell format."""
    with matplotlib.rc_context(STYLE):
        cells = ax.pcolormesh(values, cmap=HEAT, vmin=0, vmax=vmax, linewidth=0)
        ax.set_xticks([i + 0.5 for i in range(len(x))], x)
        ax.set_yticks([i + 0.5 for i in range(len(y))], y)
        ax.invert_yaxis()
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        bar = ax.figure.colorbar(cells, ax=ax, label=label, aspect=30, pad=0.02)
        bar.outline.set_visible(False)
        bar.solids.set_rasterized(False)
        for (row, column), value in _cells(values) if annotate else ():
            ax.text(column + 0.5, row + 0.5, format(value, annotate), ha="center", va="center", fontsize=7)
    return cells


def _cells(values):
    return [((i, j), v) for i, row in enumerate(values) for j, v in enumerate(row) if not math.isnan(v)]


_numbers = itertools.count(1)


def figure(fig, caption, alt=None):
    """A matplotlib figure as inline SVG with its caption: transparent ground, black drawn in the text's colour."""
    for legend in itertools.chain(fig.legends, *([ax.get_legend()] for ax in fig.axes)):
        if legend is not None:
            legend.set_frame_on(False)
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        fig.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(?<= d=")[^"]*', _shorter, svg)
    mark = f"f{next(_numbers)}-"  # ids are page-wide, and matplotlib numbers every figure's from one
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}", svg)
    svg = re.sub(r"((?:stroke|fill): )#000000", r"\1currentColor", svg)
    width = re.search(r'width="([\d.]+)pt"', svg).group(1)
    tag = rf'<svg role="img" aria-label="{_label(alt or caption)}" \1 style="max-width: {width}pt">'
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', tag, svg, count=1)
    return Html(f'<figure><div class="wide">{svg}</div><figcaption>{_safe(caption)}</figcaption></figure>')


def _shorter(path):
    """A path's data in hundredths of a point, a rectangle by its corners: a heatmap is hundreds of these."""
    data = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), path[0])
    data = re.sub(r"\s*\n\s*", "", data)
    corner = r"(-?[\d.]+)"
    return re.sub(rf"^M {corner} {corner}L {corner} \2L \3 {corner}L \1 \4L \1 \2z?$", r"M\1 \2H\3V\4H\1z", data)


def _label(value):
    plain = re.sub(r"<[^>]*>", "", value) if isinstance(value, Html) else html.escape(str(value), quote=True)
    return plain.replace("\\", "\\\\").replace('"', "&quot;")


def details(summary, *blocks):
    """Blocks that the reader opens."""
    return Html(f"<details><summary>{_safe(summary)}</summary>{_blocks(blocks)}</details>")


def _blocks(blocks):
    return "".join(b if isinstance(b, Html) else text(b) for b in blocks)


def page(title, sections, subtitle=None):
    """The whole page: ``sections`` are ``(heading or None, [blocks])``; a ``str`` block is an escaped paragraph."""
    parts = [text(title, "h1")]
    if subtitle:
        parts.append(text(subtitle, css="subtitle"))
    for heading, blocks in sections:
        blocks = [blocks] if isinstance(blocks, str) else blocks
        parts.append(f"<section>{text(heading, 'h2') if heading else ''}{_blocks(blocks)}</section>")
    return Html(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_safe(title)}</title><style>{_SHEET}</style></head>\n<body><main>\n" + "\n".join(parts)
        + f"\n</main>{_SORT if any('<table class=sortable>' in p for p in parts) else ''}</body></html>\n")


def write(path, markup):
    """Writes a page, whole or not at all."""
    files.write(path, markup.encode("utf-8"))
