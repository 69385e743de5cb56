"""A comparison: training runs as rows of a table, each with several seeds, trained, scored and held against a baseline.

``config.py`` says what a study's YAML holds, ``jobs.py`` which runs that makes, ``commands.py`` and ``pool.py`` run
them, ``scoring.py`` and ``score.py`` judge one run, ``ledger.py`` keeps what is done, ``statistics.py`` compares,
``report.py`` and ``plots.py`` show, and ``command.py`` is the whole. ``docs/study.md`` has a worked example.
"""
