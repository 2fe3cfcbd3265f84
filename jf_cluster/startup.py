"""What ``.venv`` does whenever Python starts (see the Makefile): Ray's variables, and imports without the collector.

Torch, transformers and Ray make a million objects while they are imported, almost all of which stay. Python's collector
of cycles looks at them again and again, and takes them apart one by one when the process ends: a quarter of the
processor time of a worker that starts, loads nothing and ends. Only the standard library is imported here.
"""

from __future__ import annotations

import atexit
import gc

from jf_cluster import ray_environment as ray_environment

IMPORTING = 50_000
"""New objects after which the collector looks, until :func:`imported`."""

_usual = gc.get_threshold()


def imported() -> None:
    """From here on work is done: what there is stays, and cycles that hold tensors are to be found as soon as ever.

    To be called before there is any model, since what is in a cycle now is never freed.
    """
    if gc.get_threshold()[0] == IMPORTING:
        gc.set_threshold(*_usual)
        gc.freeze()


if 0 < _usual[0] < IMPORTING:
    gc.set_threshold(IMPORTING, *_usual[1:])
    atexit.register(gc.freeze)  # nothing is left to take apart at the end
