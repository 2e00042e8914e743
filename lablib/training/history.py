"""What a training leaves behind: its losses, or the error that stopped it."""

from dataclasses import dataclass, field


class NonFiniteLoss(ArithmeticError):
    """A loss or a gradient became infinite or no number; the weights are those before that step."""


@dataclass
class History:
    """What a training did.

    losses: one a step, in nats, auxiliary losses left out. held_out: (steps done, held-out loss).
    seconds, tokens: of this call alone, so that a resumed run does not count the earlier part.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    resumed_from: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Targets a second over this call, held-out evaluation included."""
        return self.tokens / self.seconds if self.seconds else 0.0
