"""The command lines that use a model: ``chat``, ``generate``, ``serve`` and ``calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jf_cluster.command import clear_errors, start_logging
from jf_cluster.config import ConfigError

# torch takes seconds to import: --help is answered without it.
if TYPE_CHECKING:
    from jf_cluster.inference.loaded import Loaded, Settings

Model = Annotated[str, typer.Argument(help="Model directory (for example runs/tiny/models/round-003) or hub id.")]
Mode = Annotated[str, typer.Option("--mode", help="auto, ar, jacobi or multiblock.")]
BlockSize = Annotated[int | None, typer.Option(help="Draft length n.")]
Blocks = Annotated[int | None, typer.Option(help="Blocks in flight K of multiblock.")]
Pool = Annotated[int | None, typer.Option(help="Recycled candidates of multiblock.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest response.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="0 keeps all tokens.")]
TopP = Annotated[float, typer.Option(help="1 keeps all tokens.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="String that ends a response; may be repeated.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="torch's threads on a CPU.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


def _load(model: str, dtype: str, device: str | None, threads: int | None, trust: bool) -> Loaded:
    from jf_cluster.inference.loaded import load
    from jf_cluster.jacobi.attention import check_model

    loaded = load(model, dtype=dtype, device=device, threads=threads, trust_remote_code=trust)
    check_model(loaded.model)
    return loaded


def _settings(
    loaded: Loaded,
    mode: str,
    block_size: int | None,
    blocks: int | None,
    pool: int | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: list[str] | None,
) -> Settings:
    from jf_cluster.inference.loaded import Settings
    from jf_cluster.jacobi.sampling import Sampling

    if max_new_tokens < 1 or any(not s for s in stop or ()):
        raise ConfigError("--max-new-tokens must be at least 1, and a --stop must not be empty")
    try:
        sampling = Sampling(temperature, top_k, top_p)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    drafting, explanation = loaded.drafting(mode, block_size=block_size, blocks=blocks, pool=pool)
    typer.echo(f"decoding: {explanation}", err=True)
    return Settings(drafting, sampling, max_new_tokens, tuple(stop or ()), seed)


def chat(
    model: Model,
    mode: Mode = "auto",
    block_size: BlockSize = None,
    blocks: Blocks = None,
    pool: Pool = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to a model and see what each forward pass writes."""
    start_logging()
    with clear_errors():
        loaded = _load(model, dtype, device, threads, trust_remote_code)
        settings = _settings(
            loaded, mode, block_size, blocks, pool, max_new_tokens, temperature, top_k, top_p, seed, stop
        )
        from rich.console import Console

        from jf_cluster.inference.chat import converse

        console = Console()
        console.print("each forward pass has a shade of its own; /new begins again, /quit ends", style="dim")
        converse(loaded, settings, console, lambda: console.input("[bold]> [/bold]"))


def generate(
    model: Model,
    prompts: Annotated[Path, typer.Argument(help="Text file (a prompt a line) or JSONL.")],
    output: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    column: Annotated[str, typer.Option(help="JSONL field with the prompt, where there are no messages.")] = "prompt",
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text: no chat template.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
    mode: Mode = "auto",
    block_size: BlockSize = None,
    blocks: Blocks = None,
    pool: Pool = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer the prompts of a file into a file."""
    start_logging()
    with clear_errors():
        if not prompts.is_file():
            raise ConfigError(f"there is no file {prompts}")
        if not output.parent.is_dir():
            raise ConfigError(f"there is no directory {output.parent} to write to")
        loaded = _load(model, dtype, device, threads, trust_remote_code)
        from jf_cluster.inference.files import read_tasks, respond, write_rows
        from jf_cluster.progress import meter

        tasks = read_tasks(prompts, loaded, column, template=loaded.has_template and not plain)
        settings = _settings(
            loaded, mode, block_size, blocks, pool, max_new_tokens, temperature, top_k, top_p, seed, stop
        )
        rows: dict[int, dict] = {}
        with meter("prompts", len(tasks)) as progress:
            for index, row in respond(loaded, tasks, settings, batch):
                rows[index] = row
                progress.advance(1)
        write_rows(output, (rows[i] for i in range(len(tasks))))
        failed = sum("error" in row for row in rows.values())
        typer.echo(f"{len(tasks) - failed} responses, {failed} prompts that did not fit → {output}", err=True)


def calibrate(
    model: Model,
    prompts: Annotated[Path | None, typer.Option(help="File with prompts like those to come; see generate.")] = None,
    column: Annotated[str, typer.Option(help="JSONL field with the prompt.")] = "prompt",
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure which decoding is fastest on this machine, and keep it beside the model for --mode auto."""
    start_logging()
    with clear_errors():
        loaded = _load(model, dtype, device, threads, trust_remote_code)
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


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Name clients know the model by. Default: its directory's.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of a replica.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a replica.")] = 0.0,
    rows: Annotated[int, typer.Option(min=1, help="Requests a replica decodes together.")] = 4,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; beyond them the answer is 429.")] = 16,
    context: Annotated[int, typer.Option(min=2, help="Most tokens of prompt and response together.")] = 4096,
    mode: Mode = "auto",
    block_size: BlockSize = None,
    blocks: Blocks = None,
    pool: Pool = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer OpenAI's protocol (/v1/chat/completions, /v1/completions, /v1/models) until interrupted."""
    start_logging()
    with clear_errors():
        from jf_cluster.inference.server import Options, run_server

        options = Options(
            model=model, name=name or Path(model).name, host=host, port=port, replicas=replicas, cpus=cpus, gpus=gpus,
            rows=rows, queue=queue, context_tokens=context, mode=mode, block_size=block_size, blocks=blocks, pool=pool,
            dtype=dtype, threads=threads, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        run_server(options, lambda line: typer.echo(line, err=True))
