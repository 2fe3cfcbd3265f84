"""The algorithm: branch attention, trajectories, noise, packing, loss and decoding.

Imports torch, transformers and ``trajectory_store`` only; never Ray, DeepSpeed or MLflow.

Letters of the shape comments, used everywhere below this package: ``T`` tokens of a flat sequence, ``S`` stems,
``R`` branches, ``B`` rows of a batch, ``Q`` query tokens of a row, ``K`` key slots, ``H`` query heads, ``G`` key-value
heads, ``D`` head width, ``V`` vocabulary, ``n`` block size.
"""

from jf_cluster.jacobi.decoding import Generation, generate, stream
from jf_cluster.jacobi.drafts import Drafting
from jf_cluster.jacobi.sampling import Sampling

__all__ = ["Drafting", "Generation", "Sampling", "generate", "stream"]
