"""``python -m jf_cluster``: the local cluster, status, dashboard, table, configuration, and using a model."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from jf_cluster.command import DEFAULT_CONFIG, ConfigPath, Overrides, clear_errors, load, start_logging
from jf_cluster.config import ConfigError, ModelConfig
from jf_cluster.inference import commands as inference
from jf_cluster.planning.command import plan

app = typer.Typer(help="Jacobi Forcing at cluster scale.", no_args_is_help=True, add_completion=False)
cluster_app = typer.Typer(
    help="A local Ray head on 127.0.0.1, with its dashboard and job server.", no_args_is_help=True
)
app.add_typer(cluster_app, name="cluster")
for use in (plan, inference.chat, inference.generate, inference.serve, inference.calibrate):
    app.command()(use)

SCRIPT_WIDTH = 150
"""Columns where the output is not a terminal."""

RunsDir = Annotated[Path, typer.Option(help="Where the head's process id and log are kept.")]


@cluster_app.command()
def start(runs_dir: RunsDir = Path("runs")) -> None:
    """Start the head and wait until it takes jobs."""
    start_logging()
    from jf_cluster import cluster

    with clear_errors():
        head = cluster.start_head(runs_dir)
    typer.echo(f"Ray runs at {head.address}; dashboard and job server: {head.dashboard}")
    typer.echo("next: . .venv/bin/activate && ray job submit jobs/collect.py   (stop it with: make cluster-stop)")


@cluster_app.command()
def stop(runs_dir: RunsDir = Path("runs")) -> None:
    """Stop the head and every process it started."""
    start_logging()
    from jf_cluster import cluster

    with clear_errors():
        found = cluster.stop_head(runs_dir)
    typer.echo("the Ray head is stopped" if found else "no Ray head of this project runs")


@app.command()
def config(
    overrides: Overrides = None,
    config: ConfigPath = DEFAULT_CONFIG,
    reference: Annotated[
        bool, typer.Option("--reference", help="Print docs/configuration.md: what each means.")
    ] = False,
) -> None:
    """Print the resolved configuration: every setting there is, with its value."""
    if reference:
        from jf_cluster.config_reference import reference as page

        typer.echo(page(), nl=False)
        return
    with clear_errors():
        typer.echo(load(config, overrides).to_yaml(), nl=False)


@app.command("hash")
def hashes(model: inference.Model) -> None:
    """Print the content hashes of a model and its tokenizer, as `python -m trajectory_store import` takes them."""
    with clear_errors():
        from jf_cluster.models import model_hash, tokenizer_hash, tokenizer_of

        base = ModelConfig(path=model).base
        typer.echo(f"--model-hash {model_hash(base)} --tokenizer-hash {tokenizer_hash(tokenizer_of(base))}")


@app.command()
def report(
    overrides: Overrides = None,
    config: ConfigPath = DEFAULT_CONFIG,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print it as the README has it, to paste.")] = False,
) -> None:
    """Print the table of the rounds so far."""
    with clear_errors():
        settings = load(config, overrides)
        if not settings.run_dir.is_dir():
            raise ConfigError(f"there is no run in {settings.run_dir}; start it with: make train")
        from jf_cluster.report import markdown, print_evaluation, print_table, rows_of

        rows = rows_of(settings)
        if as_markdown:
            typer.echo(markdown(rows))
            return
        if rows:
            print_evaluation(settings, rows[-1].round)
        print_table(rows)


@app.command()
def status(
    overrides: Overrides = None,
    config: ConfigPath = DEFAULT_CONFIG,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end, for scripts.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between refreshes.")] = 2.0,
) -> None:
    """Show what the run is doing, what is done and left, and its last errors; Ctrl-C ends it."""
    with clear_errors():
        settings = load(config, overrides)
        if not settings.run_dir.is_dir():
            raise ConfigError(f"there is no run in {settings.run_dir}; start it with: make train")
        from rich.console import Console
        from rich.live import Live

        from jf_cluster.status import StatusReader, rendered

        reader = StatusReader(settings)
        if once:
            console = Console()
            Console(width=console.width if console.is_terminal else SCRIPT_WIDTH).print(rendered(reader.read()))
            return
        with contextlib.suppress(KeyboardInterrupt), Live(rendered(reader.read()), auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(rendered(reader.read()), refresh=True)


@app.command()
def mlflow(
    overrides: Overrides = None,
    config: ConfigPath = DEFAULT_CONFIG,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
    browser: Annotated[bool | None, typer.Option(help="Open a browser. Default: where there is a display.")] = None,
) -> None:
    """Serve the MLflow dashboard of the runs on 127.0.0.1 until interrupted."""
    with clear_errors():
        settings = load(config, overrides)
        from jf_cluster.dashboard.serving import has_display, landing_page, serve
        from jf_cluster.tracking.store import is_server, tracking_uri
        from trajectory_store import without_secrets

        if is_server(uri := tracking_uri(settings)):
            server = without_secrets(uri)
            typer.echo(f"the runs are tracked by the MLflow server at {server}: {landing_page(settings, server)}")
            return
        raise typer.Exit(serve(settings, port, has_display() if browser is None else browser))


if __name__ == "__main__":
    app(prog_name="python -m jf_cluster")
