"""The rounds: collect with model r-1, train model r, evaluate it, and again; resumable at every step.

What is done is read from the outputs alone (a sealed round, a model directory, an evaluation file), each of which
appears in one atomic step. So there is no state to go wrong: the same call does whatever is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from jf_cluster.cluster import connected, joined_cluster
from jf_cluster.collect import collect_round
from jf_cluster.collect.crew import Crew
from jf_cluster.collect.prompts import pin
from jf_cluster.config import Config, ConfigError, load_config
from jf_cluster.dashboard import show
from jf_cluster.evaluate import load_evaluation
from jf_cluster.evaluate.evaluating import evaluate_round
from jf_cluster.locks import lock
from jf_cluster.models import is_hub_id, resolve
from jf_cluster.pipeline import collect_and_train
from jf_cluster.preflight import check, check_cluster
from jf_cluster.report import print_evaluation, print_table
from jf_cluster.run_log import kept_log
from jf_cluster.stopping import raise_if_asked
from jf_cluster.tracking import Tracker
from jf_cluster.train import drop_leftovers, train_round
from jf_cluster.typed import JobName, Typed
from jf_cluster.whole_files import write_whole
from trajectory_store import TrajectoryStore, without_secrets

logger = logging.getLogger(__name__)

OPERATIONAL = frozenset(
    {
        *("name", "runs_dir", "store", "rounds", "overlap", "tracking", "model.attention"),
        *("collect.workers", "collect.cpus_per_worker", "collect.gpus_per_worker", "collect.batch_prompts"),
        *("collect.batch_timeout_s", "collect.max_attempts", "collect.forward_tokens", "collect.shard_bytes"),
        *("collect.commit_every_s", "collect.after_last"),
        *("train.workers", "train.cpus_per_worker", "train.gpus_per_worker", "train.loss_chunk_tokens", "train.zero"),
        *("train.gradient_checkpointing", "train.checkpoint_every_steps", "train.keep_checkpoints"),
        *("train.checkpoint_every_s", "train.checkpoint_async", "train.guard"),
        *("train.max_restarts", "evaluate.batch_prompts", "sandbox"),
    }
)
"""Settings that say how a run is carried out, not what comes out of it: they may change between its commands."""


class RunBusyError(RuntimeError):
    """Another process works on the same run."""


class Rounds:
    """The stages of one run, each done when its output exists and made with what it needs.

    Args:
        config: the run's.
        asked: with the settings of evaluating that were asked for; on another task than the run's own, evaluations lie
            beside the run's.
    """

    def __init__(self, config: Config, asked: Config, tracker: Tracker, ray: ExitStack, typed: Typed) -> None:
        self.config, self.asked = config, asked
        self.beside = asked.evaluate.task != config.evaluate.task
        self.typed = typed
        self.tracker = tracker
        self.store = TrajectoryStore(config.store_url)
        self._ray = ray
        self._crew: Crew | None = None

    def collected(self, round_number: int) -> bool:
        """Whether the round's trajectories are sealed."""
        return self.store.round(round_number).is_sealed

    def trained(self, round_number: int) -> bool:
        """Whether model ``round_number`` exists; model 0 always does."""
        return round_number == 0 or Path(self.config.model_dir(round_number)).is_dir()

    def evaluated(self, round_number: int) -> bool:
        """Whether model ``round_number`` has been evaluated on the task that was asked for."""
        return load_evaluation(self.asked, round_number, beside=self.beside) is not None

    def collect(self, round_number: int | None = None) -> None:
        """Collect a round; by default the first that is not collected and whose model exists."""
        if round_number is None:
            round_number = next(r for r in _count(1) if not self.collected(r))
            if not self.trained(round_number - 1):
                due = round_number - 1
                self._say(f"round {due} is collected already and waits to be trained", "train", due)
                return
        elif round_number == 0:
            raise ConfigError("round 0 is the base model, for which nothing is collected: rounds count from 1")
        elif self.collected(round_number):
            self._say(f"round {round_number} is collected already", "train", round_number)
            return
        self._make_models(round_number - 1)
        self._collect(round_number)
        place = self.store.round(round_number).folder.path
        self._say(f"trajectories of round {round_number} are in {place}", "train", round_number)

    def train(self, round_number: int | None = None) -> None:
        """Train a round; by default the first whose model is missing. What it learns from is collected if need be."""
        if round_number is None:
            round_number = next(r for r in _count(1) if not self.trained(r))
        elif round_number == 0:
            raise ConfigError("round 0 is the base model, which is not trained: rounds count from 1")
        if self.trained(round_number):
            self._say(f"model {round_number} is trained already", "evaluate", round_number)
            return
        self._make_models(round_number)
        self._say(f"model {round_number} is in {self.config.model_dir(round_number)}", "evaluate", round_number)

    def evaluate(self, round_number: int | None = None) -> None:
        """Evaluate a model; by default the first that exists and has not been evaluated. The base goes first."""
        if round_number is None:
            round_number = next(r for r in _count(0) if not self.trained(r) or not self.evaluated(r))
            if not self.trained(round_number):
                print_table(show(self.config, self.tracker))
                self._say_evaluated(f"models 0 to {round_number - 1} are evaluated already", round_number)
                return
        self._make_models(round_number)
        self._evaluate(0)
        self._evaluate(round_number)
        print_evaluation(self.asked, round_number, beside=self.beside)
        print_table(show(self.config, self.tracker))
        place = self.config.run_dir / "evaluation"
        self._say_evaluated(f"the evaluation of model {round_number} is in {place}", round_number + 1)

    def distill(self) -> None:
        """Do all rounds, then collect with the last model too, unless ``collect.after_last`` says not to."""
        self._evaluate(0)
        for round_number in range(1, self.config.rounds + 1):
            self._make_models(round_number)
            self._evaluate(round_number)
        if self.config.collect.after_last:
            self._collect(self.config.rounds + 1)
        rows = show(self.config, self.tracker)
        print_evaluation(self.config, self.config.rounds)
        print_table(rows)
        self._say(
            f"{self.config.rounds} rounds are done; the model is in {self.config.model_dir(self.config.rounds)}, "
            f"the table in {self.config.run_dir / 'report.json'}; see every step with: {self.typed.make('mlflow')}"
        )

    def _make_models(self, last: int) -> None:
        """Make every missing model up to ``last`` with the trajectories it needs."""
        for round_number in range(1, last + 1):
            if self.trained(round_number):
                continue
            if self.config.overlap == "pipelined" and not self.collected(round_number):
                collect_and_train(self.config, round_number, self.tracker, self._joined())
                show(self.config, self.tracker)
            else:
                self._collect(round_number)
                crew = self._joined()
                if self.config.overlap == "alternate":
                    crew.dismiss()  # the ranks get the machines as if nobody had been there
                train_round(self.config, round_number, self.tracker)

    def _collect(self, round_number: int) -> None:
        if not self.collected(round_number):
            collect_round(self.config, round_number, self.tracker, crew=self._joined())
            show(self.config, self.tracker)

    def _evaluate(self, round_number: int) -> None:
        if not self.evaluated(round_number):
            evaluate_round(self.asked, round_number, self.tracker, self._joined(), beside=self.beside)
            show(self.config, self.tracker)

    def _joined(self) -> Crew:
        """The run's worker processes; connects to Ray, once and only when there is work for it."""
        raise_if_asked()
        if self._crew is None:
            self._ray.enter_context(connected(self.config))
            check_cluster(self.config)
            self._crew = Crew(self.config)
            self._ray.callback(self._crew.dismiss)
        return self._crew

    def _say_evaluated(self, what: str, following: int) -> None:
        """The next round is not named behind another task's settings, which it would refuse."""
        self._say(what, None if self.beside else "collect", following)

    def _say(self, what: str, following: JobName | None = None, round_number: int = 0) -> None:
        """Say what is done, and what to type for the job that follows."""
        if following is not None:
            on_cluster = joined_cluster(self.config) is not None
            what += f"; next: {self.typed.next_job(following, round_number, on_cluster=on_cluster)}"
        logger.info("%s", what)


def _count(start: int) -> range:
    return range(start, 1_000_000)


@contextmanager
def opened(config: Config, typed: Typed | None = None, *, any_task: bool = False) -> Iterator[Rounds]:
    """Claim a run, check what it needs, open its tracking, and give its rounds; Ray is joined when there is work.

    Args:
        typed: the command line this comes from.
        any_task: models may be evaluated on another task than the run was begun with.

    Raises:
        ConfigError: the run was begun with settings that would give other results.
        RunBusyError: another process works on it.
        PreflightError, ModelError, PromptsError: something it needs is missing, or the prompts are no longer the same.
        ClusterError: Ray cannot be reached or is too small.
    """
    typed = typed or Typed()
    if not is_hub_id(config.model.base):
        resolve(config.model.base)
    check(config, typed.round)  # reads config.json only: what cannot work is told before a model is fetched
    resolve(config.model.base)
    with (
        _claimed(config, any_task) as own,
        kept_log(own.run_dir),
        Tracker.open(own) as tracker,
        ExitStack() as ray,
    ):
        pin(own)
        tracker.close_abandoned()
        drop_leftovers(own)
        yield Rounds(own, config, tracker, ray, typed)


def distill(config: Config) -> None:
    """Run the whole chain, or what is missing of it."""
    with opened(config) as rounds:
        rounds.distill()


@contextmanager
def _claimed(config: Config, any_task: bool) -> Iterator[Config]:
    """Hold the run's lock and record its configuration; gives it, as ``_record`` does."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with (config.run_dir / "lock").open("w") as held:
        try:
            lock(held, wait=False)
        except BlockingIOError as error:
            raise RunBusyError(
                f"another process works on the run in {config.run_dir}: wait for it, or give this one another name"
            ) from error
        yield _record(config, any_task)


def _record(config: Config, any_task: bool = False) -> Config:
    """Write config.yaml, or make sure that this configuration continues the one it holds; neither with secrets.

    Returns:
        The run's configuration: with ``any_task``, where evaluating is asked for on another task, the run's own
        settings of it instead.

    Raises:
        ConfigError: names the settings that differ.
    """
    path = config.run_dir / "config.yaml"
    rounds, own = config.rounds, config
    if path.is_file():
        if any_task and (evaluate := load_config(path).evaluate).task != config.evaluate.task:
            own = config.model_copy(update={"evaluate": evaluate})
        # An older version recorded secrets too.
        begun = OmegaConf.to_container(OmegaConf.create(without_secrets(path.read_text())))
        # A setting that came with a newer version had its default's effect before.
        before = _leaves(Config().shown()) | _leaves(begun)
        if differing := _differing(before, _leaves(own.shown())):
            raise ConfigError(
                "\n".join(
                    [
                        f"the run in {config.run_dir} was begun with other settings:",
                        *differing,
                        f"Set them back, or start another run (name=other), or delete {config.run_dir} to begin again.",
                    ]
                )
            )
        if own is not config:
            _record_beside(config)
        rounds = max(rounds, int(begun.get("rounds", 0)))
    write_whole(path, own.model_copy(update={"rounds": rounds}).to_yaml())
    return own


def _record_beside(config: Config) -> None:
    """Keep the settings of evaluating on a task beside the run's own, or make sure that they are those of before.

    Raises:
        ConfigError: names the settings that differ.
    """
    task = config.evaluate.task
    path = config.run_dir / "evaluation" / f"{task}.yaml"
    now = {"evaluate": config.shown()["evaluate"]}
    if path.is_file() and any(path.parent.glob(f"round-*-{task}.json")):
        before = _leaves({"evaluate": load_config(path).shown()["evaluate"]})
        if differing := _differing(before, _leaves(now)):
            raise ConfigError(
                "\n".join(
                    [
                        f"models were evaluated on {task} with other settings:",
                        *differing,
                        f"Set them back, or delete {path.with_name(f'*{task}*')} to evaluate all of them again.",
                    ]
                )
            )
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(now)))


def _differing(before: dict[str, object], now: dict[str, object]) -> list[str]:
    """A line for each setting, by dotted name, that differs and changes results."""
    return [
        f"  {key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _is_operational(key)
    ]


def _is_operational(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in OPERATIONAL)


def _leaves(tree: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as dotted names."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, part in tree.items() for key, value in _leaves(part, f"{prefix}{name}.").items()}
