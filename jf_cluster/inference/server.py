"""``python -m jf_cluster serve``: OpenAI's protocol over HTTP on Ray Serve, on 127.0.0.1 unless told otherwise.

In float32 a replica's answers are the ones AR would give with the same seed, whatever else is decoded beside them.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from jf_cluster.cluster import ClusterError, join_or_start
from jf_cluster.inference.replica import Options, Replica
from jf_cluster.listening import warn_if_open
from jf_cluster.models import resolve, tokenizer_of

STARTING_S = 600.0
APPLICATION = "jf_cluster"
"""What Ray Serve knows the server by."""


def run_server(options: Options, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ModelError, ConfigError: the model or a setting cannot be used; told before Ray is started where possible.
        ClusterError: the port is taken, there are too few GPUs, or the replicas did not come up.
    """
    options.decoding.check()
    resolve(options.model)
    tokenizer_of(options.model, options.loading.trust_remote_code)
    warn_if_open("the model's server", options.host, "leave --host out, or put a proxy with authentication in front")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise ClusterError(f"port {options.port} on {options.host} cannot be had: {error.strerror}") from error
    # One more for Ray Serve's own actors.
    join_or_start(os.environ.get("RAY_ADDRESS"), options.replicas * options.cpus + 1)
    stopped = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopped  # an Event has a lock, which the handler might find taken for ever
        stopped = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        if "RAY_ADDRESS" not in os.environ:  # a cluster that was joined may bring GPUs when they are asked for
            _check_gpus(options)
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": options.port})
        replica = Replica.options(
            num_replicas=options.replicas,
            # More than the scheduler takes, so that it is the scheduler who answers 429.
            max_ongoing_requests=4 * (options.rows + options.queue) + 16,
            ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        )
        try:
            handle = serve.run(replica.bind(options), name=APPLICATION, route_prefix="/")
            explanation = handle.describe.remote().result(timeout_s=STARTING_S)
        except (RuntimeError, RayServeException, TimeoutError) as error:
            raise ClusterError(f"the server did not come up: {_reason() or error}") from error
        say(f"decoding: {explanation}")
        say(f"{options.name} answers at http://{options.host}:{options.port}/v1 (Ctrl-C ends it)")
        while not stopped:
            time.sleep(0.5)
    finally:
        serve.shutdown()
        ray.shutdown()


def _check_gpus(options: Options) -> None:
    """Refuse replicas that Ray has no GPU for: Ray Serve would wait for one without end and without a word."""
    needed, there = options.replicas * options.gpus, ray.cluster_resources().get("GPU", 0.0)
    if needed > there:
        raise ClusterError(
            f"{options.replicas} replica(s) with --gpus {options.gpus:g} need {needed:g} GPU(s) and Ray has {there:g}: "
            "lower --replicas, let replicas share one (--gpus 0.5), or serve on the CPU (--gpus 0)"
        )


def _reason() -> str:
    """What a replica ended with, in one line; Ray Serve's exception names the deployment only. Empty where none did."""
    there = serve.status().applications.get(APPLICATION)
    said = [deployment.message.strip() for deployment in there.deployments.values()] if there else []
    return next((message.splitlines()[-1] for message in said if message), "")
