"""A run's `report.html`: one file that opens from disk and carries everything it shows."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 9rem; }
tr.router td:first-child { color: var(--accent); font-weight: 600; }
tr.faint td { color: var(--faint); }
pre { border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
"""


@dataclass(frozen=True)
class Section:
    """A part of a report.  body: HTML already."""

    title: str
    body: str


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
    more: Sequence[Section] = (),
) -> None:
    """Write a run's report.

    figure: the PNG of `training_figure`; it is embedded.
    configuration: the resolved configuration as YAML.
    versions: of Python, of the libraries that matter and of the project.
    command: what to type to get this run again.
    more: sections before those that say how to repeat it.

    Raises:
        ValueError: when the router or every baseline is missing from the evaluation.
        OSError: when the figure cannot be read.
    """
    sections = [
        Section("Held-out accuracy, % with 95 % intervals", _results(evaluation, before)),
        *([Section("Attention on the experts", _attention(attention))] if attention else []),
        *more,
        Section("Run it again", text(command)),
        Section("Versions", table(("", "version"), [(escape(key), escape(value)) for key, value in versions.items()])),
        Section("Configuration", text(configuration)),
    ]
    top = _verdict(verdict(evaluation)) + picture(figure, "Reward, attention and held-out accuracy")
    write_page(path, name, top, sections)


def write_page(path: Path, name: str, top: str, sections: Sequence[Section]) -> None:
    """Write a page that carries everything it shows.  top: HTML of what comes first."""
    parts = [f"<h2>{escape(section.title)}</h2>\n{section.body}" for section in sections]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(name)} · n-Musketeers</title><style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>n-Musketeers · {escape(name)}</h1>\n{top}\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    replace_file(path, page.encode())


def picture(path: Path, says: str) -> str:
    """A PNG as part of the page.  says: what it shows, for who does not see it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(says)}" src="data:image/png;base64,{data}">'


def text(content: str) -> str:
    """Lines as they are."""
    return f"<pre>{escape(content)}</pre>"


def paragraph(content: str, faint: bool = False) -> str:
    """Running text."""
    return f"<p{' class=faint' if faint else ''}>{escape(content)}</p>"


def lead(content: str) -> str:
    """The sentence that matters most."""
    return f"<p class=verdict>{escape(content)}</p>"


def _verdict(outcome: Verdict) -> str:
    hindsight = f"<p class=hindsight>{escape(outcome.hindsight)}</p>" if outcome.hindsight else ""
    return lead(outcome.text) + hindsight


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
    return _table(("", *map(escape, experts)), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table from cells that are HTML already."""
    return _table(header, [("", row) for row in rows])


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The same; each row comes with its class."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n" for kind, cells in rows
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
