"""Runs the project's comparisons, as far as they are missing, and writes docs/results.md and docs/results.json.

    make results                                   # everything; days on two cores, and it can be interrupted
    python scripts/results.py --only needless      # one of them
    python scripts/results.py --only composed --no-runs   # what has finished so far
    python scripts/results.py --published          # go on from the published runs: train only what they lack

What has finished is kept beside the page, in docs/results/*.tar.xz: of each run its settings, the verdict on every
answer and its metrics.  The pictures there are made with the page.  Explanations stand in docs/results.md between the
generated parts, and stay.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cluster.run import finished  # noqa: E402 - the project may not be installed
from cluster.run.guarded import guarded  # noqa: E402
from cluster.run.sweep import Arm as SweepArm  # noqa: E402
from cluster.run.sweep import Point, grid, named_arms, tuned, tuning  # noqa: E402
from cluster.run.sweeping import Plan, comparable, run  # noqa: E402
from cluster.watch import comparison, ladder  # noqa: E402
from cluster.watch.comparison import Arm, Cell, Run  # noqa: E402
from cluster.watch.results import LABELS  # noqa: E402
from scripts.published import publish, restore, same_models  # noqa: E402

TEXT, FROZEN = LABELS["text"], LABELS["frozen_policy"]
BOTH, START = "router and LoRA 8", "warm start alone"
PAGE, DATA = ROOT / "docs" / "results.md", ROOT / "docs" / "results.json"
BESIDE = ROOT / "docs" / "results"
# At the top of the page and of the README, until the comparison is made again on parts that no training has seen.
NOTICE = """\
> **A correction follows.** Held-out composed prompts are new, but their parts are not: training had seen 99.5 % of
> their `chain_sum` and 96 % of their `leg_counting` parts. On composed prompts whose parts it had never seen, the
> quickstart's router answers .597 (n = 300), and the experts' answers as text .640. Read the figures below with that in
> mind, until a corrected comparison replaces them.
"""


@dataclass(frozen=True)
class Section:
    """One comparison.

    pairs: differences beside those from the first arm: of the one from the other.
    fixed: settings of all its runs, which then lie in a folder of their own.
    """

    name: str
    recipe: str
    arms: str
    seeds: int
    tune: str | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    fixed: tuple[str, ...] = ()


SECTIONS = (
    Section(
        "needless",
        "configs/needless.yaml",
        "configs/arms/needless.yaml",
        10,
        pairs=(
            ("router", FROZEN),
            ("router", "static, 8 slots"),
            (BOTH, "LoRA 8"),
            ("no gate", FROZEN),
            ("no gate, with LoRA 8", "LoRA 8"),
        ),
    ),
    Section(
        "composed",
        "configs/quickstart.yaml",
        "configs/arms/composed.yaml",
        10,
        "learner.learning_rate=3.0e-5,3.0e-4,2.0e-3",
        (
            ("router", TEXT),
            ("router", START),
            ("router", "no warm start"),
            ("router", "self"),
            ("router", "untrained experts"),
            (BOTH, "LoRA 8"),
        ),
    ),
    Section(
        "separable",
        "configs/separable.yaml",
        "configs/arms/separable.yaml",
        10,
        "learner.learning_rate=1.0e-4,5.0e-4,2.0e-3",
        (
            ("router", "route and answer"),
            ("router", START),
            ("router", "no warm start"),
            ("router", "self"),
            (BOTH, "LoRA 8"),
        ),
    ),
    Section("choices", "configs/quickstart.yaml", "configs/arms/choices.yaml", 3),
    Section("longer", "configs/quickstart.yaml", "configs/arms/longer.yaml", 3),
    *(
        Section(
            f"composed_{seed}",
            "configs/quickstart.yaml",
            "configs/arms/zoos.yaml",
            3,
            pairs=(("router", TEXT),),
            fixed=tuple(
                f"{model}=zoo/composed@{seed}/{name}"
                for model, name in (
                    ("policy.model", "policy"),
                    ("experts.0.model", "chain_sum"),
                    ("experts.1.model", "leg_counting"),
                )
            ),
        )
        for seed in (1, 2)
    ),
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS])
    parser.add_argument("--no-runs", action="store_true", help="train nothing: write what has finished")
    parser.add_argument("--published", action="store_true", help="go on from the runs in docs/results")
    parser.add_argument("--root", default="runs/results", help="where the runs are")
    parser.add_argument("--parallel", type=int, default=2, help="runs at once")
    return parser.parse_args()


def main() -> None:
    """Every section that is asked for."""
    given, console = arguments(), Console()
    for section in SECTIONS:
        if given.only and section.name not in given.only:
            continue
        root = f"{given.root}/{section.name}" if section.fixed else given.root
        # Nobody serves these routers.
        spared = ("checkpoint.groups=false", "evaluation.stand_ins=0")
        fixed = (f"root={root}", "execution=inline", *spared, *section.fixed)
        plan = Plan(
            ROOT / section.recipe, fixed, named_arms(ROOT / section.arms), section.seeds, section.tune, "make results"
        )
        archive = BESIDE / f"{section.name}.tar.xz"
        if given.published:
            _restore(plan, archive, console)
        if not given.no_runs:
            same_models([finished.read(folder) for folder in _ended(plan).folders])
        if not given.no_runs and not run(plan, given.parallel, None, None, console):
            raise SystemExit(f"{section.name}: not every run has succeeded; the same command goes on")
        ended = _ended(plan)
        runs = _compared(ended.points, ended.arms, console) if ended.arms else []
        arms = comparison.compare(runs) if runs else []
        if ended.folders and not publish(archive, ended.folders, console.print):
            continue  # or the page would be about other runs than those beside it
        if arms:
            # A router before its first update is that very router with less to train.
            _write(section, runs, arms, ended.tried, (*plan.beyond, START))
        else:
            console.print(f"{section.name}: too little has finished for a comparison")
    console.print(PAGE, DATA, highlight=False)


@dataclass(frozen=True)
class Ended:
    """What has ended of a plan.

    folders: of every run, tuning's too.  tried: each arm's accuracies on validation prompts, by setting.
    arms, points: what is compared; none before tuning is over.
    """

    folders: list[Path]
    tried: dict[str, dict[str, float]]
    arms: list[SweepArm]
    points: list[Point]


def _ended(plan: Plan) -> Ended:
    trials = tuning(plan.recipe, plan.overrides, plan.arms, plan.tune) if plan.tune else {}
    tried = [point for points in trials.values() for point in points]
    ended = [point.config.folder for point in tried if point.finished]
    if len(ended) < len(tried):
        return Ended(ended, {}, [], [])
    scores = {point: finished.validated(point.config.folder) for point in tried}
    measured = {
        str(arm.name): {each.arm.overrides[-1]: scores[each] for each in points} for arm, points in trials.items()
    }
    chosen = tuned(plan.arms, trials, scores.__getitem__)
    done = [point for point in grid(plan.recipe, plan.overrides, chosen, plan.seeds) if point.finished]
    return Ended([*ended, *(point.config.folder for point in done)], measured, chosen, done)


def _restore(plan: Plan, archive: Path, console: Console) -> None:
    """The published runs of a plan: tuning's first, which decide on the others."""
    trials = tuning(plan.recipe, plan.overrides, plan.arms, plan.tune) if plan.tune else {}
    restore(archive, [point for points in trials.values() for point in points], console.print)
    if arms := _ended(plan).arms:
        restore(archive, grid(plan.recipe, plan.overrides, arms, plan.seeds), console.print)


def _compared(done: Sequence[Point], arms: Sequence[SweepArm], console: Console) -> list[Run]:
    """Arm by arm, what the first was before its first update, and the baselines that the first run measured.

    Nothing while the first arm has no run.
    """
    kept = comparable(done, arms, console)
    if not kept:
        return []
    runs = [finished.read(point.config.folder, point.arm.name) for point in kept]
    known = {run.name for run in runs}
    yardstick = [point for point in kept if point.arm == arms[0] and point.config.router.warm_start.steps]
    runs[len(yardstick) : len(yardstick)] = [finished.unrewarded(point.config.folder, START) for point in yardstick]
    return [*runs, *(run for run in finished.frozen(kept[0].config.folder) if run.name not in known)]


def _write(
    section: Section,
    runs: Sequence[Run],
    arms: Sequence[Arm],
    tried: dict[str, dict[str, float]],
    beyond: Sequence[str],
) -> None:
    there = {run.name for run in runs}
    pairs = {pair: _difference(runs, *pair) for pair in section.pairs if there >= set(pair)}
    primary = comparison.primary(arms, beyond)
    values = json.loads(DATA.read_text()) if DATA.is_file() else {}
    values[section.name] = {
        "command": f"python scripts/results.py --only {section.name}",
        "primary": None if primary is None else asdict(primary),
        "pairs": [{"of": of, "from": other, **asdict(cell)} for (of, other), cell in pairs.items()],
        "tuning": tried,
        "arms": [_without_places(asdict(arm)) for arm in arms],
    }
    DATA.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    ladder.ladder_figure(arms, BESIDE / f"{section.name}-ladder.png", beyond)
    ladder.cost_figure(arms, BESIDE / f"{section.name}-cost.png")
    text = with_notice(PAGE.read_text(encoding="utf-8"))
    begin, end = f"<!-- {section.name}: begin -->", f"<!-- {section.name}: end -->"
    if begin not in text:
        text += f"\n## {section.name.capitalize()}\n\n{begin}\n{end}\n"
    made = f"{begin}\n{_markdown(section, arms, primary, pairs, tried, beyond)}{end}"
    PAGE.write_text(re.sub(f"{begin}.*?{end}", lambda _: made, text, flags=re.S), encoding="utf-8")


def with_notice(page: str) -> str:
    """The page with the notice below its title."""
    title, _, rest = page.partition("\n")
    return page if NOTICE in page else f"{title}\n\n{NOTICE}{rest}"


def _difference(runs: Sequence[Run], of: str, other: str) -> Cell:
    """On the first arm's most telling column: composed prompts, or the mean over tasks."""
    ordered = [run for run in runs if run.name == other] + [run for run in runs if run.name == of]
    arm = comparison.compare(ordered)[-1]
    return arm.difference[comparison.COMPOSED if comparison.COMPOSED in arm.difference else comparison.MEAN]


def _markdown(
    section: Section,
    arms: Sequence[Arm],
    primary: comparison.Primary | None,
    pairs: dict[tuple[str, str], Cell],
    tried: dict[str, dict[str, float]],
    beyond: Sequence[str],
) -> str:
    lines = [f"`{section.recipe}`, `{section.arms}`; {len(arms[0].seeds)} seeds.", ""]
    if primary is not None:
        apart = ", ".join(arm.label for arm in arms if arm.label in beyond)
        lines += [f"**{primary.text}**", "", f"Not among its rivals: {apart}.", ""]
    lines += [f"![held-out accuracy of every arm, with every seed as a dot](results/{section.name}-ladder.png)", ""]
    lines += [comparison.markdown(arms)]
    lines += [f"![accuracy against what training cost](results/{section.name}-cost.png)", ""]
    if pairs:
        lines += ["| difference, in points | [95 %] |", "|---|---|"]
        lines += [f"| {of} – {other} | {comparison.in_points(cell)} |" for (of, other), cell in pairs.items()] + [""]
    if tried:
        rates = list(next(iter(tried.values())))
        lines += [f"| accuracy on validation prompts | {' | '.join(rates)} |", "|---" * (1 + len(rates)) + "|"]
        lines += [f"| {name} | {' | '.join(f'{100 * v:.1f}' for v in mine.values())} |" for name, mine in tried.items()]
        lines += [""]
    return "\n".join(lines)


def _without_places(arm: dict[str, Any]) -> dict[str, Any]:
    return arm | {"runs": [Path(folder).name for folder in arm["runs"]]}


if __name__ == "__main__":
    guarded(main)
