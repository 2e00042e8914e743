import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lablib.data import Batches
from lablib.models import GPT, GPTConfig
from lablib.scaling.averages import WeightAverages, swapped
from lablib.training import evaluate, fit
from lablib.training.optimizers import adamw

CONFIG = GPTConfig(vocab_size=32, dim=16, n_layers=1, n_heads=1, max_length=16)
TOKENS = torch.randint(32, (2000,), generator=torch.Generator().manual_seed(0))


def test_averages_are_torchs():
    from lightning import Callback

    torch.manual_seed(0)
    model = GPT(CONFIG)
    held_out = [TOKENS[:68].view(4, 17)]

    class Torchs(Callback):
        """torch's own average of the same weights, begun after the first step as ours is."""

        model = None

        def on_train_batch_end(self, trainer, module, *_):
            if self.model is None:
                average = get_ema_multi_avg_fn(0.9)
                self.model = AveragedModel(module.model, multi_avg_fn=average)
            self.model.update_parameters(module.model)

    torchs, ours = Torchs(), WeightAverages((0.0, 0.9), held_out, 5)
    options = {"steps": 20, "optimizer": adamw(1e-2), "progress": False}
    fit(model, Batches(TOKENS, 4, 16), **options, callbacks=[ours, torchs])
    for mine, theirs in zip(ours.averages[1], torchs.model.module.parameters()):
        torch.testing.assert_close(mine, theirs)
    assert [step for step, _ in ours.curves[1]] == [5, 10, 15, 20]
    assert ours.curves[0][-1][1] == pytest.approx(evaluate(model, held_out))
    assert ours.curves[1][-1][1] == pytest.approx(evaluate(torchs.model.module, held_out))
    assert ours.curves[1][-1][1] != pytest.approx(ours.curves[0][-1][1])


def test_the_model_gets_its_own_weights_back():
    model = GPT(CONFIG)
    before = [p.clone() for p in model.parameters()]
    with swapped(model, [torch.zeros_like(p) for p in before]):
        assert all(not p.any() for p in model.parameters())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    with pytest.raises(ValueError, match="not in"):
        WeightAverages((1.0,), [], 1)
