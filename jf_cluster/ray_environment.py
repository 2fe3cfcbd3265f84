"""Ray's environment variables, set before Ray is imported: token authentication, loopback, no telemetry.

`ray.init()` switches token authentication on by itself, `ray job submit` does not and is then refused; both read these
variables. `.venv` imports this module whenever Python starts (jf_cluster/startup.py), so that the `ray` command typed
in a fresh shell finds the cluster of `make cluster` with nothing exported by hand; elsewhere importing jf_cluster does.
Only the standard library is imported here, and what the user has set is left alone.
"""

from __future__ import annotations

import os
import sys

DASHBOARD_PORT = 8265

HOME_VARIABLE = "JF_CLUSTER_HOME"
"""Set by the head for its jobs: the directory relative paths are taken from, also when a job runs in a copy."""

DEFAULTS = {
    "RAY_AUTH_MODE": "token",
    # 0 keeps Ray's servers on 127.0.0.1, on Linux too. Export 1 on every machine of a cluster of several nodes.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray runs its workers at niceness 15; here they are the work, and anything else on the machine would starve them.
    "RAY_worker_niceness": "0",
    # Ray gives its own control service 5 s to answer, and a machine with much else to do needs longer to start it.
    "RAY_gcs_rpc_server_connect_timeout_s": "60",
    # A job's copy that could not be unpacked once would be taken for broken for ten minutes, by later jobs as well.
    "BAD_RUNTIME_ENV_CACHE_TTL_SECONDS": "0",
    # Ray Train's watcher for nodes about to be taken away tells ranks that do not listen to it: a process less a start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

# Ray keeps what it read when it was imported: a change after that would set its processes at odds with each other.
if "ray" not in sys.modules:
    for _name, _value in DEFAULTS.items():
        os.environ.setdefault(_name, _value)
    if "RAY_ADDRESS" not in os.environ:
        # Where `ray job submit` sends jobs; without it the command guesses among all Rays of the machine.
        os.environ.setdefault("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{DASHBOARD_PORT}")
