"""A run's `report.html`: one file that opens from disk and carries everything it shows."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from cluster.watch.logs import replace_file
from cluster.watch.results import ORACLE, ROUTER, Evaluation, Verdict, verdict
from cluster.watch.tables import Attention, columns, result_rows

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --faint: #6b7785; --line: #e1e5ea; --accent: #0b84c6; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --faint: #9aa5b1; --line: #323f4b; --accent: #4cc9f0; --page: #14191f; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
.verdict { border-left: 4px solid var(--accent); padding: .4rem 1rem; font-weight: 600; }
.hindsight, td small, .faint { color: var(--faint); font-weight: normal; }
img { width: 100%; border: 1px solid var(--line); border-radius: 6px; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.router td:first-child { color: var(--accent); font-weight: 600; }
tr.faint td { color: var(--faint); }
pre { border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
"""


def write_report(
    path: Path,
    *,
    name: str,
    evaluation: Evaluation,
    figure: Path,
    configuration: str,
    versions: Mapping[str, str],
    command: str,
    before: Evaluation | None = None,
    attention: Attention | None = None,
) -> None:
    """Write the report.

    figure: the PNG of `training_figure`; it is embedded.
    configuration: the resolved configuration as YAML.
    versions: of Python, of the libraries that matter and of the project.
    command: what to type to get this run again.

    Raises:
        ValueError: when the router or every baseline is missing from the evaluation.
        OSError: when the figure cannot be read.
    """
    picture = base64.b64encode(figure.read_bytes()).decode()
    parts = [
        f"<h1>n-Musketeers · {escape(name)}</h1>",
        _verdict(verdict(evaluation)),
        f'<img alt="Reward, attention and held-out accuracy" src="data:image/png;base64,{picture}">',
        "<h2>Held-out accuracy, % <span class=faint>with 95 % intervals</span></h2>",
        _results(evaluation, before),
        _attention(attention) if attention else "",
        f"<h2>Run it again</h2><pre>{escape(command)}</pre>",
        _versions(versions),
        f"<h2>Configuration</h2><pre>{escape(configuration)}</pre>",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · n-Musketeers</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )
    replace_file(path, page.encode())


def _verdict(outcome: Verdict) -> str:
    hindsight = f"<p class=hindsight>{escape(outcome.hindsight)}</p>" if outcome.hindsight else ""
    return f"<p class=verdict>{escape(outcome.text)}</p>{hindsight}"


def _results(evaluation: Evaluation, before: Evaluation | None) -> str:
    rows = []
    for row in result_rows(evaluation, before):
        kind = "router" if row.system == ROUTER else "faint" if row.system in (ORACLE, "before") else ""
        values = (f"<b>{cell.value}</b>" if cell.best else cell.value for cell in row.cells)
        cells = (f"{value} <small>{cell.interval}</small>" for value, cell in zip(values, row.cells, strict=True))
        rows.append((kind, (escape(row.label), *cells)))
    return _table(("", *map(escape, columns(evaluation))), rows)


def _attention(attention: Attention) -> str:
    experts = list(dict.fromkeys(expert for shares in attention.values() for expert in shares))
    rows = [
        ("", (escape(task), *(f"{shares[expert]:.2f}" if expert in shares else "–" for expert in experts)))
        for task, shares in attention.items()
    ]
    return f"<h2>Attention on the experts</h2>{_table(('', *map(escape, experts)), rows)}"


def _versions(versions: Mapping[str, str]) -> str:
    rows = [("", (escape(library), escape(version))) for library, version in versions.items()]
    return f"<h2>Versions</h2>{_table(('', 'version'), rows)}"


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table from cells that are HTML already; each row comes with its class."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n" for kind, cells in rows
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
