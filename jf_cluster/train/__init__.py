"""Training: a round of trajectories → DeepSpeed ZeRO-3 ranks under Ray Train → a Hugging Face model directory.

``driver`` starts and watches the ranks, ``worker`` is what each rank does, ``plan`` says which samples every step
consumes, ``engine`` holds everything that is particular to DeepSpeed, ``checkpoints`` and ``export`` what is written.
"""

from jf_cluster.train.driver import Arriving, TrainingError, stop_request, train_round

__all__ = ["Arriving", "TrainingError", "stop_request", "train_round"]
