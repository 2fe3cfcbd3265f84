"""The command lines that use a model: ``chat``, ``generate``, ``serve`` and ``calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jf_cluster.command import clear_errors, start_logging
from jf_cluster.config import ConfigError
from jf_cluster.inference.options import DecodingOptions, LoadOptions, ResponseOptions, grouped

# torch takes seconds to import: what needs it is imported where it is used, so that --help is answered without it.

Model = Annotated[str, typer.Argument(help="Model directory (for example runs/tiny/models/round-003) or hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU where there is one.")]


@grouped
def chat(
    model: Model,
    decoding: DecodingOptions,
    response: ResponseOptions,
    loading: LoadOptions,
    device: Device = None,
) -> None:
    """Talk to a model and see what each forward pass writes."""
    start_logging()
    with clear_errors():
        loaded = loading.load(model, device)
        settings = response.settings(loaded, decoding)
        from rich.console import Console

        from jf_cluster.inference.chat import converse

        console = Console()
        console.print("each forward pass has a shade of its own; /new begins again, /quit ends", style="dim")
        converse(loaded, settings, console, lambda: console.input("[bold]> [/bold]"))


@grouped
def generate(
    model: Model,
    prompts: Annotated[Path, typer.Argument(help="Text file (a prompt a line) or JSONL.")],
    output: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    decoding: DecodingOptions,
    response: ResponseOptions,
    loading: LoadOptions,
    device: Device = None,
    column: Annotated[str, typer.Option(help="JSONL field with the prompt, where there are no messages.")] = "prompt",
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text: no chat template.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
) -> None:
    """Answer the prompts of a file into a file."""
    start_logging()
    with clear_errors():
        if not prompts.is_file():
            raise ConfigError(f"there is no file {prompts}")
        if output.is_dir():
            raise ConfigError(f"{output} is a directory: name a file in it to write")
        if not output.parent.is_dir():
            raise ConfigError(f"there is no directory {output.parent} to write to")
        loaded = loading.load(model, device)
        from jf_cluster.inference.files import read_tasks, respond, write_rows
        from jf_cluster.progress import meter

        tasks = read_tasks(prompts, loaded, column, template=loaded.has_template and not plain)
        settings = response.settings(loaded, decoding)
        rows: dict[int, dict] = {}
        with meter("prompts", len(tasks)) as progress:
            for index, row in respond(loaded, tasks, settings, batch):
                rows[index] = row
                progress.advance(1)
        write_rows(output, (rows[i] for i in range(len(tasks))))
        failed = sum("error" in row for row in rows.values())
        typer.echo(f"{len(tasks) - failed} responses, {failed} prompts that did not fit → {output}", err=True)


@grouped
def calibrate(
    model: Model,
    loading: LoadOptions,
    device: Device = None,
    prompts: Annotated[Path | None, typer.Option(help="File with prompts like those to come; see generate.")] = None,
    column: Annotated[str, typer.Option(help="JSONL field with the prompt.")] = "prompt",
) -> None:
    """Measure which decoding is fastest on this machine, and keep it beside the model for --mode auto."""
    start_logging()
    with clear_errors():
        loaded = loading.load(model, device)
        from rich.console import Console

        from jf_cluster.inference.files import read_tasks
        from jf_cluster.inference.loaded import table
        from jf_cluster.jacobi.calibration import kept_in, machine, stored

        ids = None
        if prompts is not None:
            ids = [t.ids for t in read_tasks(prompts, loaded, column, template=loaded.has_template)]
        choice = loaded.calibrate(ids)
        Console().print(table(choice, machine(loaded.model)))
        typer.echo(choice.explanation)
        typer.echo(f"kept in {kept_in(loaded.model)}" if stored(loaded.model) else "not kept")


@grouped
def serve(
    model: Model,
    decoding: DecodingOptions,
    loading: LoadOptions,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Name clients know the model by. Default: its directory's.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of a replica.")] = 1.0,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs of a replica. Default: 1 where this machine has one, else 0.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests a replica decodes together.")] = 4,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; beyond them the answer is 429.")] = 16,
    context: Annotated[int, typer.Option(min=2, help="Most tokens of prompt and response together.")] = 4096,
) -> None:
    """Answer OpenAI's protocol (/v1/chat/completions, /v1/completions, /v1/models) until interrupted."""
    start_logging()
    with clear_errors():
        import torch

        from jf_cluster.inference.replica import Options
        from jf_cluster.inference.server import run_server

        if gpus is None:
            gpus = 1.0 if torch.cuda.is_available() else 0.0
        options = Options(
            model=model, name=name or Path(model).name or Path.cwd().name,
            decoding=decoding, loading=loading, host=host, port=port, replicas=replicas,
            cpus=cpus, gpus=gpus, rows=rows, queue=queue, context_tokens=context,
        )  # fmt: skip
        run_server(options, lambda line: typer.echo(line, err=True))
