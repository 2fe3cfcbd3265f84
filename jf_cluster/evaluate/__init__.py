"""Evaluating: a round's model answers prompts in every decoding mode; right or wrong, and how fast.

``evaluating.evaluate_round`` is not imported here: collecting needs the graders of this room, and evaluating needs what
collecting is made of.
"""

from jf_cluster.evaluate.evaluation import MODES, Evaluation, ModeResult, evaluation_path, load_evaluation

__all__ = ["MODES", "Evaluation", "ModeResult", "evaluation_path", "load_evaluation"]
