"""Learning-rate schedules, as factors of the peak."""

import math

SCHEDULES = ("cosine", "wsd", "constant", "inverse-sqrt")


def learning_rate_factor(
    step: int,
    steps: int,
    schedule: str = "cosine",
    warmup: int = 0,
    floor: float = 0.1,
    decay: float = 0.2,
) -> float:
    """The learning rate of step 0, 1, ... as a share of its peak.

    It rises linearly over `warmup` steps; then "cosine" falls to `floor` at the end (Loshchilov and
    Hutter, 2017), "wsd" stays and falls linearly over the last `decay` share of the steps
    (warmup-stable-decay; Hu et al., 2024), "constant" stays, and "inverse-sqrt" falls with one over
    the root of the step (T5; Raffel et al., 2020, section 3.1.2). The last two do not depend on
    `steps`, so any step could have been the end.
    Raises ValueError for another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "inverse-sqrt":
        return math.sqrt(max(1, warmup) / (step + 1))
    if schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return floor + (1 - floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    left = (steps - step) / max(1.0, decay * steps)
    return floor + (1 - floor) * min(1.0, max(left, 0.0))
