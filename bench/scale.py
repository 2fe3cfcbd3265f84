"""``python -m bench.scale``: how collecting scales with collectors and with prompts.

*Real*: one and then two collectors with the embedded model, a core each; `ratio_real_2_vs_1` is prompts per second.

*Simulated*: the same dispatcher, Ray actors (a process each) and store on one machine; only the model is replaced, by
sleeping as long as the real batches took, scaled to `--batch-seconds` on average. `efficiency_*` is the share of their
time in which collectors were in their model, of all collectors from the first whole batch of the last one on;
`ratio_efficiency_*` is that against one collector, which is throughput / (collectors x throughput of one) without the
chance of which latencies were drawn. All processes share the machine's cores, so what is lost is an upper bound of what
dispatching and committing cost. The driver's processor time and memory are of the same window.

*Prompts*: a round of so many small rows, nearly all committed, in shards with as many rows a record batch as real ones
have: a local file of prompts listed for the first time and again, what is left found, the round sealed and the first
steps of training planned, each in a fresh process; seconds, most resident memory (`_peak_mib`), and the most without
the files mapped into memory, whose pages the system takes back when it needs them (`_own_peak_mib`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import simulated, tiny_inputs
from bench.many_prompts import prompt_figures
from bench.measure import Value, median, parser, report, resident
from trajectory_store import Provenance, Trajectory, TrajectoryStore

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

    from jf_cluster.collect.dispatch import Dispatcher, Event
    from jf_cluster.config import Config

GIVE_UP_S = 900.0


class Window:
    """Batches of a run of the dispatcher from when every collector has done one: for ``seconds``, and two of each."""

    def __init__(self, collectors: int, seconds: float) -> None:
        self.seconds = seconds
        self.prompts: list[list[int]] = [[] for _ in range(collectors)]
        self.model_s: list[list[float]] = [[] for _ in range(collectors)]
        self.done_at: list[list[float]] = [[] for _ in range(collectors)]
        self.began: float | None = None
        self.over = False
        self.cpu_s = self.grown_bytes = 0.0

    def add(self, collector: int, prompts: int, model_s: float) -> None:
        if self.over:
            return
        now = time.monotonic()
        self.prompts[collector].append(prompts)
        self.model_s[collector].append(model_s)
        self.done_at[collector].append(now)
        if self.began is None and all(self.done_at):
            self.began, self._cpu_s, self._bytes = now, time.process_time(), resident()
        if self.began is not None and now >= self.began + self.seconds and all(self._twice(t) for t in self.done_at):
            self.over = True
            self.cpu_s, self.grown_bytes = time.process_time() - self._cpu_s, resident() - self._bytes

    def _twice(self, times: Sequence[float]) -> bool:
        return len(times) > 1 and times[-2] >= (self.began or 0.0)

    def _of_each(self, figures: Sequence[Sequence[float]]) -> Iterator[tuple[float, float]]:
        """Sum and seconds of each collector's batches in the window, between the first's end and the last's."""
        for values, times in zip(figures, self.done_at, strict=True):
            first = sum(at < (self.began or 0.0) for at in times)
            yield sum(values[first + 1 :]), times[-1] - times[first]

    @property
    def batches(self) -> int:
        return sum(at > (self.began or 0.0) for times in self.done_at for at in times)

    @property
    def prompts_per_s(self) -> float:
        return sum(count / seconds for count, seconds in self._of_each(self.prompts))

    @property
    def in_model(self) -> float:
        """Share of the collectors' time in which they were in their model."""
        sums = list(self._of_each(self.model_s))
        return sum(busy for busy, _ in sums) / sum(seconds for _, seconds in sums)


def measured(
    dispatcher: Dispatcher[Any, Any],
    batches: Callable[[], Iterator[Sequence[Any]]],
    window: Window,
    read: Callable[[Event[Any, Any]], tuple[int, int, float]],
) -> Window:
    """Run a dispatcher until its window is over; ``read`` gives an event's collector, prompts and model seconds."""
    stop_at = time.monotonic() + GIVE_UP_S

    def while_measuring() -> Iterator[Sequence[Any]]:
        for batch in batches():
            if window.over or time.monotonic() > stop_at:
                return
            yield batch

    for event in dispatcher.run(while_measuring()):
        window.add(*read(event))
        if window.over:
            break  # what is still under way is of no account, and the dispatcher ends its workers
    if not window.over:
        raise RuntimeError("the collectors did not get ready in time, or there were too few prompts")
    return window


def real(config: Config, collectors: int, seconds: float, round_number: int) -> Window:
    """Collect with so many real collectors."""
    from jf_cluster.collect.batches import batches_of
    from jf_cluster.collect.crew import Crew
    from jf_cluster.collect.dispatch import Dispatcher, Done
    from jf_cluster.collect.prompts import load_prompts
    from jf_cluster.collect.worker import Collector
    from jf_cluster.models import load_tokenizer, model_hash, tokenizer_hash

    tokenizer = load_tokenizer(config)
    prompts = load_prompts(config, tokenizer, round_number)
    provenance = Provenance(
        model_hash(config.model_dir(0)), tokenizer_hash(tokenizer), config.collect.block_size_of(1), config.seed, 1,
        "bench", {},
    )  # fmt: skip
    crew, job = Crew(config), numbered(Collector)
    dispatcher: Dispatcher[Any, Any] = Dispatcher(
        lambda number: crew.start(job, number, config, 1, provenance, f"real{collectors}.{number}"),
        workers=collectors, timeout_s=600, max_attempts=1,
    )  # fmt: skip

    def read(event: Event[Any, Any]) -> tuple[int, int, float]:
        assert isinstance(event, Done), event
        number, counts = event.result
        return number, counts.prompts, counts.respond_s + counts.trace_s

    return measured(
        dispatcher,
        lambda: batches_of(config, prompts, np.arange(len(prompts))),
        Window(collectors, seconds),
        read,
    )


def numbered(collector: type) -> type:
    """A collector whose results say whose they are."""
    from jf_cluster.collect.dispatch import Report

    class Numbered(collector):  # type: ignore[misc]
        def __init__(self, number: int, *arguments: Any) -> None:
            self.number = number
            super().__init__(*arguments)

        def run(self, items: Sequence[Any]) -> Any:
            done = super().run(items)
            return Report((self.number, done.result), done.durable)

    return Numbered


def simulation(
    folder: Path,
    collectors: int,
    rows: Sequence[Trajectory],
    provenance: Provenance,
    batch_s: Sequence[float],
    batch_prompts: int,
    seconds: float,
) -> tuple[Window, list[float]]:
    """Collect with so many simulated collectors; also the seconds of their commits."""
    import ray

    from jf_cluster.collect.dispatch import Dispatcher, Done
    from jf_cluster.config import CollectConfig

    remote = ray.remote(num_cpus=1 / 512)(simulated.Collector)
    shared_rows = ray.put(list(rows))
    commit_every_s = CollectConfig().commit_every_s

    def start(number: int) -> tuple[ActorHandle[Any], ray.ObjectRef[Any]]:
        actor: Any = remote.remote(str(folder), provenance, number, shared_rows, list(batch_s), commit_every_s)
        return actor, actor.ready.remote()

    dispatcher: Dispatcher[simulated.Item, simulated.Worked] = Dispatcher(
        start, workers=collectors, timeout_s=600, max_attempts=1
    )
    commits: list[float] = []

    def batches() -> Iterator[list[simulated.Item]]:
        for batch in range(1 << 40):
            yield [simulated.Item(f"{batch:012x}{place:04x}") for place in range(batch_prompts)]

    def read(event: Event[Any, Any]) -> tuple[int, int, float]:
        assert isinstance(event, Done), event
        worked = event.result
        if worked.commit_s is not None:
            commits.append(worked.commit_s)
        return worked.collector, len(event.items), worked.model_s

    return measured(dispatcher, batches, Window(collectors, seconds), read), commits


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--real-seconds", type=float, default=15.0, help="window of each real measurement")
    p.add_argument("--real-batch", type=int, default=16, help="prompts of a real batch")
    p.add_argument("--collectors", type=int, nargs="+", default=[1, 16, 256], help="simulated; the first is 1")
    p.add_argument("--batch-seconds", type=float, default=15.0, help="mean of a simulated batch, as of a large model")
    p.add_argument("--batch-prompts", type=int, default=64, help="prompts of a simulated batch")
    p.add_argument(
        "--window-batches", type=float, default=2.0, help="mean batches a simulated collector is measured for"
    )
    p.add_argument("--prompts", type=int, default=10_000_000)
    p.add_argument("--folder", type=Path, help="where to put stores and prompts (a few GB); by default a temporary one")
    args = p.parse_args()
    if args.collectors[0] != 1:
        p.error("--collectors must begin with 1, which the others are compared with")
    import ray

    from jf_cluster.cluster import connected
    from jf_cluster.config import Config

    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # Arrow's own pool keeps 8 MB more in each actor
    figures: dict[str, Value] = {"cores": os.cpu_count() or 1}
    with contextlib.ExitStack() as held:
        folder = args.folder or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bench-scale-")))
        config = Config.model_validate(
            {
                "name": "scale",
                "runs_dir": folder / "runs",
                "model": {"path": str(tiny_inputs.TINY)},
                "prompts": {"per_round": 4_000, "grader": "arithmetic"},
                "collect": {"workers": 2, "batch_prompts": args.real_batch, "commit_every_s": 0},
            }
        )
        with contextlib.nullcontext() if ray.is_initialized() else connected(config):
            windows = [real(config, n, args.real_seconds, n) for n in (1, 2)]
            rates = [window.prompts_per_s for window in windows]
            figures |= {"ratio_real_2_vs_1": rates[1] / rates[0]}
            figures |= {f"real_prompts_per_s_{n}": rate for n, rate in zip((1, 2), rates, strict=True)}
            batch_s = [s for of_one in windows[0].model_s for s in of_one]
            figures |= {"real_batch_s_median": median(batch_s), "real_batch_s_longest": max(batch_s)}
            scale = args.batch_seconds * len(batch_s) / sum(batch_s)
            latencies = [s * scale for s in batch_s]
            round_ = TrajectoryStore(config.store_url).round(1)
            round_.seal(round_.provenance)
            reader = round_.reader()
            rows = [reader[i] for i in range(min(len(reader), args.batch_prompts))]
            figures |= {"batch_s_mean": args.batch_seconds, "batch_prompts": args.batch_prompts}
            alone = 0.0
            for collectors in args.collectors:
                window, commits = simulation(
                    folder / f"simulated-{collectors}", collectors, rows, reader.manifest.provenance, latencies,
                    args.batch_prompts, args.window_batches * args.batch_seconds,
                )  # fmt: skip
                alone = alone or window.in_model
                figures |= {
                    f"ratio_efficiency_{collectors}": window.in_model / alone,
                    f"efficiency_{collectors}": window.in_model,
                    f"prompts_per_s_{collectors}": window.prompts_per_s,
                    f"driver_cpu_ms_a_batch_{collectors}": 1e3 * window.cpu_s / window.batches,
                    f"driver_mib_grown_{collectors}": window.grown_bytes / 2**20,
                    f"driver_mib_{collectors}": resident() / 2**20,
                }
                if commits:
                    figures |= {f"commit_ms_median_{collectors}": 1e3 * median(commits)}
        figures |= prompt_figures(folder / "many", args.prompts)
    report("scale: collectors and prompts", figures, args.json)


if __name__ == "__main__":
    main()
