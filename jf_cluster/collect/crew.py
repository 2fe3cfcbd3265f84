"""Worker processes that outlive a stage: they take up one job after another and new weights without being restarted.

A :class:`Host` is the Ray actor; what it does is a job (a collector, an evaluator) that is put into it and works with
the host's models. The :class:`Crew` keeps the hosts of a run between stages until they are to leave their machines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray
import torch
from ray.actor import ActorHandle
from transformers import AutoConfig, PreTrainedModel

from jf_cluster.collect.dispatch import POLL_S, Report
from jf_cluster.config import Config
from jf_cluster.jacobi.responses import Writer, generate_responses
from jf_cluster.jacobi.vllm_responses import VllmWriter
from jf_cluster.models import ModelError, load_model, model_hash, reload_weights, use_cpu
from jf_cluster.stopping import raise_if_asked

ENDED_WITHIN_S = 10.0
"""How long ending processes are waited for; somebody else may have taken their cores before that was seen."""


class Job(Protocol):
    """What a host does with batches; see jf_cluster.collect.dispatch."""

    def run(self, items: Sequence[Any]) -> Report[Any]: ...

    def finish(self) -> list[str]: ...


@dataclass(frozen=True)
class _Held:
    """A model at hand: whose round's it is and the content hash of its weights."""

    model: PreTrainedModel
    round: int
    hash: str


class WorkerModels:
    """The models of one worker process: the base, and the newest, whose weights are replaced in place.

    A job asks for a round's model by its content hash, so it can never work with another round's weights.
    """

    def __init__(self, config: Config) -> None:
        # Ray gives a worker its share of the cores and torch would take them all.
        use_cpu(config.collect.cpus_per_worker)
        on_gpu = config.collect.gpus_per_worker > 0 and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self._config = config
        self._base: _Held | None = None
        self._newest: _Held | None = None
        self._vllm: VllmWriter | None = None

    def base(self) -> PreTrainedModel:
        """Model 0."""
        return self.of_round(0)

    def base_writer(self) -> Writer:
        """What writes model 0's responses; a vLLM engine stays for as long as this process.

        Raises:
            ModelError: vLLM is asked for and not installed.
        """
        settings = self._config.collect
        if settings.generator == "builtin":
            return partial(generate_responses, self.base())
        if self._vllm is None:
            path = self._config.model_dir(0)
            context = AutoConfig.from_pretrained(path, trust_remote_code=self._config.model.trust_remote_code)
            try:
                self._vllm = VllmWriter(
                    path, dtype=self._config.model.dtype, context=context.get_text_config().max_position_embeddings
                )
            except ImportError as error:
                raise ModelError(
                    f"collect.generator is vllm and vLLM cannot be imported ({error}): install the vllm extra in the "
                    "workers' environment, or set collect.generator=builtin"
                ) from error
        return self._vllm

    def of_round(self, round_number: int, expected_hash: str | None = None) -> PreTrainedModel:
        """Model ``round_number``; its files are read only where it is not at hand already.

        Raises:
            ModelError: it is missing or incomplete, or its weights are not those of ``expected_hash``.
        """
        if round_number > 0 and self._config.collect.responses == "self" and self._newest is None:
            self._newest, self._base = self._base, None  # nobody asks for the base any more: its memory is reused
        if not self._is_at_hand(round_number, expected_hash):
            self._take_over(round_number, expected_hash)
        held = self._base if round_number == 0 else self._newest
        assert held is not None
        return held.model

    def _is_at_hand(self, round_number: int, expected_hash: str | None) -> bool:
        held = self._base if round_number == 0 else self._newest
        return held is not None and held.round == round_number and expected_hash in (None, held.hash)

    def _take_over(self, round_number: int, expected_hash: str | None) -> None:
        path = self._config.model_dir(round_number)
        found = model_hash(path)
        if expected_hash is not None and found != expected_hash:
            raise ModelError(
                f"the model in {path} is {found[:12]}…, not {expected_hash[:12]}…, with which round "
                f"{round_number + 1} was begun: put that model back, or begin the round again"
            )
        if round_number == 0:
            self._base = _Held(load_model(self._config, 0, self.device), 0, found)
            return
        before, self._newest = self._newest, None  # while its weights are being replaced it is no round's model
        if before is not None and reload_weights(before.model, path):
            model = before.model
        else:
            del before  # its memory, before there is another
            model = load_model(self._config, round_number, self.device)
        self._newest = _Held(model, round_number, found)


class Host:
    """A worker process, the actor that jf_cluster.collect.dispatch gives batches to."""

    def __init__(self, config: Config) -> None:
        self.models = WorkerModels(config)
        self.job: Job | None = None

    def begin(self, job: type[Job], *arguments: Any) -> None:
        """Take up ``job(*arguments, models)``; returns once its models are loaded."""
        self.job = None
        self.job = job(*arguments, self.models)  # type: ignore[call-arg]

    def run(self, items: Sequence[Any]) -> Report[Any]:
        """Work on a batch."""
        return self._at_work.run(items)

    def finish(self) -> list[str]:
        """Make safe what is held back; give the ids that are now safe."""
        return self._at_work.finish()

    def call(self, method: str, *arguments: Any) -> Any:
        """What another method of the job gives."""
        return getattr(self._at_work, method)(*arguments)

    @property
    def _at_work(self) -> Any:
        if self.job is None:
            raise RuntimeError("this worker has not taken up any job")
        return self.job


def _answer(task: ray.ObjectRef, deadline: float) -> Any:
    """What a task gives, waited for until ``deadline`` on the monotonic clock or until SIGTERM came."""
    while not ray.wait([task], timeout=POLL_S)[0] and time.monotonic() < deadline:
        raise_if_asked()
    return ray.get(task, timeout=0)


class Crew:
    """The hosts of a run, at most ``collect.workers`` of them."""

    def __init__(self, config: Config) -> None:
        self._hosts = ray.remote(num_cpus=config.collect.cpus_per_worker, num_gpus=config.collect.gpus_per_worker)(Host)
        self._config = config
        self._idle: list[ActorHandle] = []

    def start(self, job: type[Job], *arguments: Any) -> tuple[ActorHandle, ray.ObjectRef]:
        """A host that takes up a job, an idle one if there is any, and the task that says when it is ready."""
        host = self._idle.pop() if self._idle else self._hosts.remote(self._config)
        return host, host.begin.remote(job, *arguments)

    def ask(self, timeout_s: float, job: type[Job], arguments: Sequence[Any], method: str, *given: Any) -> Any:
        """What a method of a job gives, on one host; a host that fails is not used again.

        Raises:
            ray.exceptions.RayError: the host died, it could not take up the job, the method failed, or no answer came
                in time.
        """
        host, ready = self.start(job, *arguments)
        deadline = time.monotonic() + timeout_s
        try:
            _answer(ready, deadline)
            answer = _answer(host.call.remote(method, *given), deadline)
        except BaseException:
            ray.kill(host)
            raise
        self.rest(host)
        return answer

    def rest(self, host: ActorHandle) -> None:
        """Keep a host that has nothing to do for the next job."""
        self._idle.append(host)

    @classmethod
    @contextmanager
    def given_or_own(cls, crew: Crew | None, config: Config) -> Iterator[Crew]:
        """``crew``, or where there is none a new one that is dismissed at the end."""
        if crew is not None:
            yield crew
            return
        own = cls(config)
        try:
            yield own
        finally:
            own.dismiss()

    def dismiss(self) -> None:
        """End the idle hosts; when this returns their memory is free, unless one takes longer than ENDED_WITHIN_S."""
        if not self._idle:
            return
        free, ended = ray.available_resources(), len(self._idle)
        while self._idle:
            ray.kill(self._idle.pop())  # which does not wait for the process's end; its cores are free after it
        held = {"CPU": self._config.collect.cpus_per_worker, "GPU": self._config.collect.gpus_per_worker}
        awaited = {name: free.get(name, 0.0) + ended * share for name, share in held.items() if share > 0}
        deadline = time.monotonic() + ENDED_WITHIN_S
        while time.monotonic() < deadline:
            free = ray.available_resources()
            if all(free.get(name, 0.0) > there - 1e-3 for name, there in awaited.items()):
                return
            time.sleep(0.05)
