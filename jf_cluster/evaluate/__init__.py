"""Evaluating: a round's model answers held-out prompts in every decoding mode; right or wrong, and how fast."""

from jf_cluster.evaluate.evaluating import evaluate_round
from jf_cluster.evaluate.evaluation import MODES, Evaluation, ModeResult, evaluation_path, load_evaluation

__all__ = ["MODES", "Evaluation", "ModeResult", "evaluate_round", "evaluation_path", "load_evaluation"]
