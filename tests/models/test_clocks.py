import pytest
import torch

from lablib import resources
from lablib.models import GPT, GPTConfig
from lablib.models.clocks import decoding_seconds


class Sleeper(torch.nn.Module):
    """A block that moves a clock instead of computing."""

    def __init__(self, clock, name, seconds):
        super().__init__()
        self.clock, self.name, self.seconds = clock, name, list(seconds)

    def forward(self, x, rotary, cache):
        cache.append(*torch.zeros(2, len(x), 2, x.shape[1], 8))
        now = self.clock[-1][-1] + self.seconds.pop(0)
        self.clock.append((self.name, x.shape[1], cache.length, now))
        return x


def test_decoding_seconds_are_medians_of_ways_that_take_turns(monkeypatch):
    model = GPT(GPTConfig(40, 32, 3, 4, 2, max_length=64))
    clock = [("start", 0, 0, 0.0)]
    prompt = torch.randint(40, (2, 6))
    own = list(model.blocks)
    monkeypatch.setattr(resources, "_clock", lambda: clock[-1][-1])
    # The prompt, the step that is not counted, then three that are.
    slow = Sleeper(clock, "slow", [100, 50, 7, 3, 4])
    fast = Sleeper(clock, "fast", [100, 50, 1, 1, 2])
    found = decoding_seconds(model, [[slow], [fast]], prompt, steps=3)
    assert found == [4, 1]
    assert [row[:3] for row in clock[1:]] == [
        (name, new, seen)
        for new, seen in [(6, 6), (1, 7), (1, 8), (1, 9), (1, 10)]
        for name in ("slow", "fast")
    ]
    assert list(model.blocks) == own
    with pytest.raises(ValueError, match="0 steps"):
        decoding_seconds(model, [own], prompt, steps=0)
    with pytest.raises(IndexError):
        decoding_seconds(model, [[slow]], prompt, steps=3)
    assert list(model.blocks) == own, "also after an error"
