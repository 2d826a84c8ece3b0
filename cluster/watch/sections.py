"""The parts of a report beyond its results: each from what a run has left in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cluster.watch import ablation
from cluster.watch.ablation_figure import ablation_figure
from cluster.watch.curves import entropy_figure, flow_figure, sharpening
from cluster.watch.report import Section, paragraph, picture, table, text
from cluster.watch.series import Record
from cluster.watch.tables import without_rows

SHOWN = 5  # answers to a prompt


def sections_of(folder: Path, metrics: Sequence[Record]) -> list[Section]:
    """What there is to show; figures are written into the folder as well.

    folder: of the run.
    """
    found = []
    if metrics:
        found += [_entropy(folder, metrics), _flow(folder, metrics)]
    summary = folder / "summary.json"
    if summary.is_file() and (told := json.loads(summary.read_text()).get("stand_ins")):
        found.insert(0, _away(told))
    if (folder / "ablation.json").is_file():
        found.insert(0, _ablation(folder))
    if (folder / "samples.json").is_file() and (samples := json.loads((folder / "samples.json").read_text())):
        found.append(_samples(samples))
    return found


def _entropy(folder: Path, metrics: Sequence[Record]) -> Section:
    entropy_figure(metrics, folder / "entropy.png")
    known = sharpening(metrics)
    said = known.text if known else "Routing entropy or reward does not vary: nothing can be said of the two together."
    shown = picture(folder / "entropy.png", "Routing entropy and reward over steps, and against each other")
    return Section("Does attention sharpen as reward rises?", paragraph(said) + shown)


def _flow(folder: Path, metrics: Sequence[Record]) -> Section:
    flow_figure(metrics, folder / "flow.png")
    return Section(
        "Throughput and staleness", picture(folder / "flow.png", "Tokens a second, seconds by stage, staleness")
    )


def _ablation(folder: Path) -> Section:
    found = json.loads((folder / "ablation.json").read_text())
    ablation_figure(found, folder / "ablation.png")
    shown = picture(folder / "ablation.png", "Accuracy lost by intervention and task, beside the attention")
    tasks = list(found["accuracy"])
    rows = [
        (escape(f"{expert}: {what}" if expert else what), *(_loss(mine[task]) for task in tasks))
        for what, expert, mine in ablation.rows_of(found)
    ]
    said = "".join(paragraph(f"{line[:1].upper()}{line[1:]}.") for line in ablation.said(found))
    where = f"step {found['step']}, {found['split']} prompts" if "step" in found else ""
    title = f"What the router needs: accuracy lost by intervention, points with 95 % intervals {where}".strip()
    return Section(title, shown + table(("", *map(escape, tasks)), rows) + said)


def _away(told: Mapping[str, Any]) -> Section:
    head = ("", *map(escape, told["whole"]))
    rows = [(escape(label), *shares) for label, shares, _ in without_rows(told)]
    said = (
        "A stand-in is a state of a training prompt that the router sees in the place of an expert that is away, where "
        "that does better than nothing in its place."
    )
    return Section("An expert is away: accuracy on validation prompts, %", table(head, rows) + paragraph(said))


def _loss(loss: Mapping[str, Any]) -> str:
    return f"{100 * loss['loss']:+.1f} <small>{100 * loss['low']:+.1f} to {100 * loss['high']:+.1f}</small>"


def _samples(samples: Sequence[Mapping[str, Any]]) -> Section:
    return Section("Prompts of the last step, and what was answered", "".join(map(_sample, samples)))


def _sample(sample: Mapping[str, Any]) -> str:
    """One prompt: what the experts say, where the router looks, and the policy's answers."""
    experts = "; ".join(f"{name}: {said!r}" for name, said in sample["experts"].items())
    looks = ", ".join(f"{name} {share:.2f}" for name, share in sample["attention"].items())
    facts = [f"right: {sample['answer']}"]
    facts += [f"attention: {looks}"] if looks else []
    facts += [f"experts say {experts}"] if experts else []
    if not sample["prefix"]:
        facts.append("the gate was closed: no prefix")
    rows = [
        (
            escape(repr(answer["text"])),
            str(answer["count"]),
            f"{answer['reward']:.2f}" if answer["status"] == "ok" else escape(answer["status"]),
            f"{answer['advantage']:+.2f}" if answer["status"] == "ok" and answer["advantage"] is not None else "–",
        )
        for answer in sample["answers"][:SHOWN]
    ]
    if rest := sum(answer["count"] for answer in sample["answers"][SHOWN:]):
        rows.append(("others", str(rest), "", ""))
    head = paragraph(f"{sample['task']}, prompt {sample['ordinal']}", faint=True) + text(sample["prompt"])
    return head + paragraph(" · ".join(facts)) + table(("answer", "times", "reward", "advantage"), rows)
