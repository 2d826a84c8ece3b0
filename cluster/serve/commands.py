"""The commands that use a trained router: `musketeers generate`, `serve` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()

Place = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, a bundle, or hub:USER/NAME.", show_default=False)
]
Step = Annotated[int | None, typer.Option(help="Which checkpoint of a run; the last one by default.")]


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, e.g. runs/quickstart.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the bundle.", show_default=False)],
    step: Step = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that is there.")] = False,
    push_to: Annotated[
        str | None, typer.Option(help="USER/NAME on the Hugging Face hub, to upload it too.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to: a new repository is private.")] = False,
) -> None:
    """Write a run's router with its recipe, results and model card as a folder to share."""
    from cluster.run.bundle import share

    for place in share(run, out, step, overwrite, push_to, private):
        console.print(place, highlight=False, soft_wrap=True)


def serve(
    run: Place,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the run's configuration.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; another host than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model, for clients; the run's by default.")] = None,
    step: Step = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that clients must send; or set MUSKETEERS_API_KEY.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to serve on, such as host:6379.")] = None,
    max_policies: Annotated[int | None, typer.Option(help="Policy replicas that Serve may scale to.", min=1)] = None,
    max_experts: Annotated[int | None, typer.Option(help="Replicas of each expert, likewise.", min=1)] = None,
    expert_timeout: Annotated[float, typer.Option(help="Seconds after which to answer without an expert.")] = 5.0,
) -> None:
    """Serve a trained router with an OpenAI-compatible API on Ray Serve."""
    from cluster.serve.serving import Options, serve_trained

    options = Options(
        host=host,
        port=port,
        name=name,
        key_file=api_key_file,
        address=address,
        most_policies=max_policies,
        most_experts=max_experts,
        expert_timeout_s=expert_timeout,
    )
    serve_trained(run, step, overrides or [], options, console)


def generate(
    run: Place,
    prompts: Annotated[list[str], typer.Argument(help="Questions; - reads one a line.", show_default=False)],
    step: Step = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value of the run's configuration.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also the policy without prefix, and each expert alone.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    samples: Annotated[int, typer.Option(help="Answers a question.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of sampling.", min=0)] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer; the run's own by default.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each question.")] = False,
) -> None:
    """Answer questions with a trained router: what it says, and which experts it listened to."""
    from cluster.serve.showing import Wanted, answer_questions

    wanted = Wanted(temperature, samples, seed, max_new_tokens, compare, as_json)
    answer_questions(run, step, override or [], prompts, wanted, console)
