"""Options that several commands share, each said once: a dataclass is a group of them, ``grouped`` spells it out."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from jf_cluster.config import ConfigError

# torch takes seconds to import: --help is answered without it.
if TYPE_CHECKING:
    from jf_cluster.inference.loaded import Loaded, Settings


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto"
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads on a CPU. Default: its cores, few for a small model; serve: --cpus."),
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False

    def load(self, model: str, device: str | None) -> Loaded:
        """Load ``model`` and refuse one that cannot be decoded in parallel; errors as ``loaded.load`` says."""
        from jf_cluster.inference.loaded import load
        from jf_cluster.jacobi.attention import branch_attention

        loaded = load(
            model, dtype=self.dtype, device=device, threads=self.threads, trust_remote_code=self.trust_remote_code
        )
        with branch_attention(loaded.model):  # which tries it
            return loaded


@dataclass(frozen=True)
class DecodingOptions:
    """How a model decodes."""

    mode: Annotated[str, typer.Option("--mode", help="auto, ar, jacobi or multiblock.")] = "auto"
    block_size: Annotated[int | None, typer.Option(help="Draft length n.")] = None
    blocks: Annotated[int | None, typer.Option(help="Blocks in flight K of multiblock.")] = None
    pool: Annotated[int | None, typer.Option(help="Recycled candidates of multiblock.")] = None

    def check(self) -> None:
        """Refuse what no model decodes with.

        Raises:
            ConfigError: an unknown mode or settings out of range.
        """
        from jf_cluster.jacobi.calibration import AUTO
        from jf_cluster.jacobi.drafts import Drafting

        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        try:
            Drafting(**given | ({"mode": "jacobi"} if self.mode == AUTO else {}))
        except ValueError as error:
            raise ConfigError(str(error)) from error


@dataclass(frozen=True)
class ResponseOptions:
    """What a response may be."""

    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 512
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0
    top_p: Annotated[float, typer.Option(help="1 keeps all tokens.")] = 1.0
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0
    stop: Annotated[list[str] | None, typer.Option("--stop", help="String that ends a response; may be repeated.")] = (
        None
    )

    def settings(self, loaded: Loaded, decoding: DecodingOptions) -> Settings:
        """Settings of a decoder; how it decodes and why is said on stderr.

        Raises:
            ConfigError: an option that cannot be used.
        """
        from jf_cluster.inference.loaded import Settings
        from jf_cluster.jacobi.sampling import Sampling

        stop = tuple(self.stop or ())
        if self.max_new_tokens < 1 or not all(stop):
            raise ConfigError("--max-new-tokens must be at least 1, and a --stop must not be empty")
        try:
            sampling = Sampling(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        drafting, explanation = loaded.drafting(**dataclasses.asdict(decoding))
        typer.echo(f"decoding: {explanation}", err=True)
        return Settings(drafting, sampling, self.max_new_tokens, stop, self.seed)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every parameter that is a group of options replaced by those options, as typer reads them."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    fields = {name: [field.name for field in dataclasses.fields(group)] for name, group in groups.items()}

    def spelled_out(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field: values.pop(field) for field in fields[name]})
        command(**values)

    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            annotations = get_type_hints(groups[name], include_extras=True)
            options = {field.name: field.default for field in dataclasses.fields(groups[name])}
        else:
            annotations, options = hints, {name: parameter.default}
        parameters += [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotations[option])
            for option, default in options.items()
        ]
    spelled_out.__name__, spelled_out.__doc__ = command.__name__, command.__doc__
    spelled_out.__annotations__ = {p.name: p.annotation for p in parameters}
    spelled_out.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return spelled_out
