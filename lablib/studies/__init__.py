"""Studies: the runs that direction claims are judged on. One module a paper.

A module has `run(**point) -> dict`, `POINTS`, `TUNING`, `CANARY`, `ROLES` and `values(runs)`, and
may have `GPU_POINTS`; `lablib.evidence.studies` says what each is.
"""
