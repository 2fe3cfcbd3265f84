"""What a person typed to have a run carried out, and from that what they type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

JobName = Literal["collect", "train", "evaluate"]


def in_a_copy() -> bool:
    """Whether this process works in the copy that Ray made of a job's ``--working-dir``."""
    return "runtime_resources" in Path.cwd().parts


@dataclass(frozen=True)
class Typed:
    """The options of a job's command line."""

    config: Path | None = None
    """None: the default one, which need not be said."""
    overrides: Sequence[str] = ()
    round: int | None = None

    def next_job(self, job: JobName, round_number: int, *, on_cluster: bool) -> str:
        """The command for ``job`` of a round with the same settings; it names the round where this one did."""
        asked = None if self.round is None else round_number
        if not on_cluster:
            return self.make(job, asked)
        options = [] if self.config is None else ["--config", str(self.config)]
        options += [] if asked is None else ["--round", str(asked)]
        options += self.overrides
        if not options and not in_a_copy():
            return f"ray job submit jobs/{job}.py"
        # From a copy of the submitter's directory, which is where the configuration is.
        copied = ["--working-dir", "."] if in_a_copy() else []
        return shlex.join(["ray", "job", "submit", *copied, "--", "python", f"jobs/{job}.py", *options])

    def make(self, target: str, round_number: int | None = None) -> str:
        """``make`` with the same settings, but for how many rounds were asked for: what there is can be looked at."""
        overrides = [override for override in self.overrides if not override.startswith("rounds=")]
        given = ["make", target]
        if self.config is not None:
            given.append(f"CONFIG={shlex.quote(str(self.config))}")
        if round_number is not None:
            given.append(f"ROUND={round_number}")
        if overrides:
            # What make puts into its recipe is split by a shell once more.
            given.append(f"SET={shlex.quote(shlex.join(overrides))}")
        return " ".join(given)
