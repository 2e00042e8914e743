import torch
from torch import nn

from lablib.models.hooks import drop_hooks_


class Counter:
    def __init__(self):
        self.calls = 0

    def before(self, module, args, kwargs):
        self.calls += 1

    def after(self, module, args, output):
        self.calls += 1


def test_an_owners_hooks_go_and_those_of_others_stay():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    one, other = Counter(), Counter()
    for counter in (one, other):
        model[0].register_forward_pre_hook(counter.before, with_kwargs=True)
        model[1].register_forward_hook(counter.after)
    drop_hooks_(model, one)
    model(torch.ones(1, 2))
    assert (one.calls, other.calls) == (0, 2)
    drop_hooks_(model, other)
    model(torch.ones(1, 2))
    assert other.calls == 2
    assert not model[0]._forward_pre_hooks and not model[0]._forward_pre_hooks_with_kwargs
