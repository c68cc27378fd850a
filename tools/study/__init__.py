"""Sweeps with an analysis: `millrace study study=<name>`.

`design.py` says what a study is, `runs.py` composes its runs, `pool.py` runs them, `results.py` makes one row of each,
`analyses/` say what the rows mean, and `report.py` writes it down. `job.py` is the job, from top to bottom.
"""
