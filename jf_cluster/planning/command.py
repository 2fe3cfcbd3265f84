"""``python -m jf_cluster plan``: what a run needs and what there is, what is refused, and how long it will take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jf_cluster.command import DEFAULT_CONFIG, ConfigPath, Overrides, clear_errors, load, start_logging
from jf_cluster.config import Config, ConfigError

# Ray and torch take seconds to import: --help and a mistyped setting are answered without them.
if TYPE_CHECKING:
    from jf_cluster.planning.machines import Machines


def plan(
    overrides: Overrides = None,
    config: ConfigPath = DEFAULT_CONFIG,
    calibration: Annotated[
        bool,
        typer.Option(help="Measure a miniature of the run, which takes a minute or a few; without, only check."),
    ] = True,
    on: Annotated[
        str | None, typer.Option(help="Plan for machines that are not here, for example 64xH100; times are computed.")
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of a GPU for an hour, in any currency; shows costs.")
    ] = None,
    scaling: Annotated[bool, typer.Option("--scaling", help="Print the tables of docs/scaling.md and end.")] = False,
) -> None:
    """Check a configuration against the machines before anything starts, and say how long it will take.

    Memory is computed from the model's config.json; weights are loaded for the calibration alone. A run that cannot
    work is refused with the setting to change, and exit code 1 or 2.
    """
    start_logging()
    with clear_errors():
        if scaling:
            from jf_cluster.planning.scaling import tables

            typer.echo("\n\n".join(tables().values()))
        else:
            _plan(load(config, overrides), calibration, on, price_per_gpu_hour)


def _plan(config: Config, calibration: bool, on: str | None, price: float | None) -> None:
    from jf_cluster import preflight
    from jf_cluster.planning.estimate import computed_passes, computed_rates, gpus_held, stages
    from jf_cluster.planning.fitting import idle_gpus, refused_on
    from jf_cluster.planning.shapes import read_shape
    from jf_cluster.planning.show import show_needs, show_times

    if price is not None and gpus_held(config) == 0:
        raise ConfigError("--price-per-gpu-hour: the run uses no GPUs (collect.gpus_per_worker, train.gpus_per_worker)")
    preflight.check_settings(config)
    shape, machines = read_shape(config), _machines(config, on)
    show_needs(config, shape, machines, disks=on is None)
    for warning in filter(None, (preflight.mlflow_warning(config), idle_gpus(config, machines))):
        typer.secho(f"warning: {warning}", fg=typer.colors.YELLOW, err=True)
    refusals = [*preflight.refused_by_model(config, shape), *refused_on(config, shape, machines)]
    if on is None:  # the disks of machines that are elsewhere cannot be looked at
        refusals += preflight.refused_places(config, shape)
    preflight.raise_refused(refusals)
    typer.echo("Nothing speaks against this run.")
    if calibration and on is None:
        from jf_cluster.planning.calibration import calibrate

        typer.echo("Measuring a miniature of it: the same actors, ranks and store, a few prompts and steps.")
        found = calibrate(config)
        typer.echo(
            f"Time, from that miniature ({found.response_tokens:.0f} tokens a response, "
            f"{found.store_bytes_per_token:.1f} bytes of store a token):"
        )
        show_times(config, stages(config, found.rates), price)
    elif machines.gpu is not None and gpus_held(config) > 0:
        typer.echo("Time, computed from data sheets and the assumptions of docs/scaling.md, not measured:")
        show_times(config, stages(config, computed_rates(config, shape, machines)), price)
        typer.echo(
            f"A round trains on {computed_passes(config):.1f} times the tokens of its own samples "
            "(train.steps, prompts.per_round; lengths are assumed)."
        )
    else:
        typer.echo("How long it takes is only known after a calibration.")


def _machines(config: Config, on: str | None) -> Machines:
    from jf_cluster.cluster import connected, joined_cluster
    from jf_cluster.planning.machines import Machines

    if on is not None:
        return Machines.thought_of(on)
    if joined_cluster(config) is None:
        return Machines.here()
    with connected(config, nodes_within_s=0.0):
        return Machines.joined()
