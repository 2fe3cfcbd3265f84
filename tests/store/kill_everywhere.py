"""Run as a program: kills a process that writes, rejects and seals at every line the store executes, then recovers.

For the k-th step a forked child runs the whole job and is killed with SIGKILL just before that step; a second child
then does what a restarted worker does (skip what is committed, write the rest, seal). Prints one JSON line per step.
A step is a line of the store's writing code: the first time each line runs, and the second time too where a file is
being published.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from tests.store.conftest import make_provenance, make_trajectory
from trajectory_store import Round, TrajectoryStore
from trajectory_store.verify import verify_round

IDS = [f"p{i}" for i in range(6)]
STEPPED_FILES = ("folder.py", "local_files.py", "state.py", "writer.py", "store.py", "seal.py")
PUBLISHING = (
    "publish",
    "create",
    "replace",
    "_publish",
    "publish_file",
    "create_file",
    "replace_file",
    "write_temporary",
)


def job(round_: Round) -> str:
    """Write what is not committed yet, in shards of two, reject one prompt, seal; the content hash."""
    if not round_.is_sealed:
        done = round_.committed_ids()
        with round_.writer(make_provenance(), writer_id="w") as writer:
            for number, prompt_id in enumerate(i for i in IDS if i not in done):
                writer.append(make_trajectory(prompt_id, response_tokens=20))
                if number % 2:
                    writer.commit()
        round_.reject("hopeless", "too long")
    return round_.seal(make_provenance()).content_hash


def kill_before(step: int) -> None:
    """Arrange for SIGKILL when the `step`-th line is about to run."""
    seen: Counter[tuple[str, int]] = Counter()
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        nonlocal count
        name = frame.f_code.co_filename
        if not (name.endswith(STEPPED_FILES) and "trajectory_store" in name):
            return None
        if event == "line":
            seen[name, frame.f_lineno] += 1
            if seen[name, frame.f_lineno] <= 1 + (frame.f_code.co_name in PUBLISHING):
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
        return trace

    sys.settrace(trace)


def in_child(work: Callable[[], None]) -> int:
    """The wait status of a forked child that does `work`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:  # whatever happened, this process must not go on as a second parent
            if status:
                traceback.print_exc()
            os._exit(status)
    return os.waitpid(child, 0)[1]


def main(folder: str, stride: int) -> None:
    # Once here, so that what pyarrow imports and initialises on first use is not done again in every child.
    job(TrajectoryStore(Path(folder) / "warm").round(1))
    step = 0
    while True:
        round_ = TrajectoryStore(Path(folder) / str(step)).round(1)

        def doomed(round_: Round = round_, step: int = step) -> None:
            kill_before(step)
            job(round_)

        killed = in_child(doomed) == signal.SIGKILL

        def recover(round_: Round = round_, step: int = step) -> None:
            bad = [f"{f.name}: {f.what}" for f in verify_round(round_) if f.severity == "bad"]
            before = round_.committed_ids()
            report = {"step": step, "bad_after_kill": bad, "committed": len(before)}
            report["hash"] = job(round_)
            report["rows"] = [t.prompt_id for t in round_.reader()]
            report["left"] = [f.name for f in verify_round(round_)]
            report["rejects"] = round_.rejects()
            sys.stdout.write(json.dumps(report) + "\n")
            sys.stdout.flush()

        if in_child(recover) != 0:
            sys.exit(f"recovery after a kill at step {step} failed")
        if not killed:
            return
        step += stride


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
