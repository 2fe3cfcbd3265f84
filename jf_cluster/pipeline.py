"""A pipelined round: trained on while it is collected, on machines that hold collectors and ranks at the same time.

The collectors go through the prompts in the order in which the first epoch takes them, and the ranks wait for what is
not there yet; so the round takes as long as the longer of the two, and its model is that of rounds that alternate.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from jf_cluster.collect import collect_round
from jf_cluster.collect.collecting import Undertaking
from jf_cluster.collect.crew import Crew
from jf_cluster.config import Config
from jf_cluster.stopping import Terminated, ask_to_stop
from jf_cluster.tracking import Tracker
from jf_cluster.train import Arriving, stop_request, train_round
from trajectory_store import Manifest

ASK_EVERY_S = 1.0


def collect_and_train(config: Config, round_number: int, tracker: Tracker, crew: Crew) -> None:
    """Collect round ``round_number`` and train on it at the same time; each goes on from where it stopped.

    If one fails the other is stopped at its next safe point, and what failed is raised. Other errors are those of
    jf_cluster.collect.collect_round and jf_cluster.train.train_round.
    """
    undertaking = Undertaking.of(config, round_number)
    stop = threading.Event()

    def collect() -> Manifest:
        return collect_round(config, round_number, tracker, crew=crew, undertaking=undertaking, stop=stop)

    request = stop_request(config, round_number)

    def sealed() -> Manifest:
        while not wait([collecting], timeout=ASK_EVERY_S).done:
            if request.exists():  # and no rank is left that could see it
                raise Terminated
        return collecting.result()

    trained = threading.Event()
    with ThreadPoolExecutor(2, "pipeline") as pool:
        collecting = pool.submit(collect)
        pool.submit(_stop_training, collecting, request, trained)
        try:
            prompt_ids = undertaking.prompts.ids()
            train_round(config, round_number, tracker, Arriving(undertaking.provenance, prompt_ids, sealed))
        except BaseException as error:
            if isinstance(error, Terminated) and collecting.done() and (cause := collecting.exception()):
                raise cause from None  # the training was stopped because of it
            stop.set()
            raise
        finally:
            trained.set()


def _stop_training(collecting: Future[Manifest], request: Path, trained: threading.Event) -> None:
    """Ask the ranks to stop when the collecting has failed; again and again, since a new start withdraws a request."""
    if collecting.exception() is not None:
        while not trained.wait(ASK_EVERY_S):
            with contextlib.suppress(OSError):  # nobody works yet, or the disk is what collecting failed for
                ask_to_stop(request)
