"""Reports from what runs have left in their folders: of one, or of several beside each other."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from html import escape
from importlib import metadata
from pathlib import Path

from cluster.config import RunConfig
from cluster.run import finished
from cluster.run.folder import RunFolder, RunFolderError
from cluster.watch import comparison, ladder, logs
from cluster.watch.comparison import Arm
from cluster.watch.figure import training_figure
from cluster.watch.report import Section, lead, paragraph, picture, table, text, write_page, write_report
from cluster.watch.sections import sections_of

REPORTED = ("n-musketeers", "torch", "transformers", "ray", "deepspeed", "reasoning-gym")


def report_run(run: Path) -> Path:
    """Writes `report.html` and its figures into a finished run's folder.

    Raises:
        RunFolderError: when it is no run, or has not finished.
    """
    folder = RunFolder(run)
    config = folder.saved_config()
    lines = logs.read(folder.eval)
    after = next((line for line in reversed(lines) if line["kind"] == "after"), None)
    if after is None or not folder.summary.is_file():
        raise RunFolderError(f"{run} has not finished: go on with it (--resume) first")
    summary = json.loads(folder.summary.read_text())
    metrics = logs.read(folder.metrics)
    figure, path = folder.path / "training.png", folder.path / "report.html"
    training_figure(metrics, after["systems"], figure)
    write_report(
        path,
        name=config.run,
        evaluation=after["systems"],
        before=next((line["systems"] for line in lines if line["kind"] == "before"), None),
        attention=attention_by_task(after["attention"]),
        figure=figure,
        configuration=config.as_yaml(),
        versions=summary["versions"],
        command=f"musketeers train {folder.config} run={config.run}-again",
        more=sections_of(folder.path, metrics),
    )
    return path


def report_runs(runs: Sequence[Path], out: Path, command: str) -> Path:
    """Writes one page on several finished runs: the primary comparison, the ladder, and what it all cost.

    Runs that differ in their seed only are one arm; the first run's is the one that the others are measured by.
    command: that made this page.

    Raises:
        RunFolderError: when one is no run, or has not finished.
        ComparisonError: when they cannot be compared.
    """
    read = [finished.read(run) for run in runs]
    arms = comparison.compare([*read, *finished.frozen(runs[0])])
    config = RunFolder(runs[0]).saved_config()
    return report_arms(arms, out, command, config)


def report_arms(
    arms: Sequence[Arm], out: Path, command: str, config: RunConfig, beyond: Sequence[str] = ladder.BEYOND
) -> Path:
    """The same from arms; config: of a run of the first arm.  beyond: labels of those that are no rivals."""
    out.parent.mkdir(parents=True, exist_ok=True)
    steps, cost = out.with_name("ladder.png"), out.with_name("cost.png")
    ladder.ladder_figure(arms, steps, beyond)
    ladder.cost_figure(arms, cost)
    primary = comparison.primary(arms, beyond)
    said = primary.text if primary else f"{arms[0].label}: there is nothing to compare it with."
    apart = ", ".join(arm.label for arm in arms if arm.label in beyond)
    top = lead(said) + paragraph(f"Not among its rivals: {apart}." if apart else "", faint=True)
    top += picture(steps, "Held-out accuracy of every arm, with every seed as a dot")
    columns = list(arms[0].accuracy)
    head = ("", "seeds", *map(escape, columns))
    rows = [
        (escape(arm.label), str(len(arm.seeds) or "–"), *(_cell(arm, column) for column in columns)) for arm in arms
    ]
    sections = [
        Section("Accuracy against cost", picture(cost, "Accuracy against operations and seconds of training")),
        Section("All of it, % with 95 % intervals over seeds and prompts", table(head, rows)),
        Section("Make it again", text(command)),
        Section("Versions", table(("", "version"), list(versions().items()))),
        Section("Configuration of the first arm", text(config.as_yaml())),
    ]
    write_page(out, f"{config.run}: {len(arms)} arms", top, sections)
    return out


def _cell(arm: Arm, column: str) -> str:
    cell = arm.accuracy[column]
    shown = f"<b>{100 * cell.value:.1f}</b> <small>{100 * cell.low:.1f} to {100 * cell.high:.1f}</small>"
    if column in arm.difference:
        other = arm.difference[column]
        shown += f"<br><small>{100 * other.value:+.1f}, {100 * other.low:+.1f} to {100 * other.high:+.1f}</small>"
    return shown


def attention_by_task(attention: dict[str, float]) -> dict[str, dict[str, float]]:
    """`attention/<task>/<expert>` -> task -> expert -> share."""
    nested: dict[str, dict[str, float]] = {}
    for key, share in attention.items():
        _, task, expert = key.split("/")
        nested.setdefault(task, {})[expert] = share
    return nested


def versions() -> dict[str, str]:
    """Python's, and those of the packages results depend on."""
    found = {"python": platform.python_version()}
    for name in REPORTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
