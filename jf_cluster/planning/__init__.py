"""Before anything starts: what a run needs, what the machines have, and how long it will take.

``shapes`` reads a model's config.json, ``memory`` and ``speed`` are formulas over shapes and settings, ``machines``
says what there is, ``calibration`` measures a miniature of the run, ``estimate`` puts times and costs together,
``fitting`` refuses what the machines cannot hold, ``scaling`` makes the tables of docs/scaling.md. Whatever else is
refused before a start is in ``jf_cluster.preflight``.
"""
