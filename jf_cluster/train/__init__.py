"""Training: a round of trajectories → DeepSpeed ZeRO-3 ranks under Ray Train → a Hugging Face model directory.

``driver`` is a round as the driver sees it, ``ranks`` starts the ranks and deals with those that fail, ``worker`` is
what each of them does, ``plan`` says which samples every step
consumes, ``engine`` holds everything that is particular to DeepSpeed, ``checkpoints`` and ``export`` what is written.
"""

from jf_cluster.train.driver import Arriving, drop_leftovers, stop_request, train_round
from jf_cluster.train.ranks import TrainingError

__all__ = ["Arriving", "TrainingError", "drop_leftovers", "stop_request", "train_round"]
