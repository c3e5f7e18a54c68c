"""``python -m ft_jax.methods``: every registered method; ``--json`` or ``--markdown`` (docs/methods.md) for the same."""

import argparse
import json

from ft_jax import registry


def rows():
    return [{"kind": m.kind, "name": m.name, "summary": m.summary, "source": m.paper} for m in registry.methods()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/methods.md")
    args = parser.parse_args(argv)
    table = rows()
    if args.markdown:
        print("# Methods\n\nWritten by `python -m ft_jax.methods --markdown > docs/methods.md`.\n")
        print("| kind | name | what it is | source |\n|---|---|---|---|")
        for r in table:
            print("| {kind} | `{name}` | {} | {source} |".format(r["summary"].replace("|", "\\|"), **r))
        return
    if args.json:
        print(json.dumps(table, indent=1))
        return
    widths = {key: max(len(r[key]) for r in table) for key in ("kind", "name", "source")}
    for r in table:
        print(f"{r['kind']:<{widths['kind']}}  {r['name']:<{widths['name']}}  {r['source']:<{widths['source']}}  {r['summary']}")


if __name__ == "__main__":
    main()
