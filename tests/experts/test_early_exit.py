import copy

import pytest
import torch
from torch.nn import functional as F

from lablib.experts import early_exit
from lablib.experts.learning_to_skip import calibrate, measured_density, set_threshold
from lablib.models import GPT, GPTConfig
from lablib.models.gpt import rotary_table


def small(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
    return GPT(GPTConfig(**sizes, max_length=64, init_std=0.2, qk_norm=True, **options))


def text(*shape, seed=0):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def rotary(model, length):
    return rotary_table(model.config, 0, length, model.embedding.weight)


def test_a_token_that_exits_stays_out():
    model = early_exit.add_confidence_exits(small()).eval()
    calibrate(model, text(8, 30), 0.6, tolerance=0.01)
    model.blocks[2].router.threshold.fill_(-1.0)  # would take back every token
    model(text(8, 30))
    stopped = ~model.blocks[1].ran
    assert 0 < stopped.sum() < stopped.numel()
    assert torch.equal(~model.blocks[2].ran, stopped)


def test_generation_with_a_cache_equals_generation_without():
    model = early_exit.add_confidence_exits(small()).eval()
    calibrate(model, text(8, 30), 0.6, tolerance=0.01)
    full = model.generate(text(3, 5), 20, greedy=True, use_cache=False)
    assert 0 < measured_density(model) < 0.95
    assert torch.equal(model.generate(text(3, 5), 20, greedy=True), full)


def test_confidence_exits_stop_where_the_prediction_is_clear():
    model, tokens = early_exit.add_confidence_exits(small()).eval(), text(4, 16)
    set_threshold(model, 0.0)
    model(tokens)
    assert measured_density(model) == 1, "no prediction is certain"
    threshold = calibrate(model, tokens, 0.6, tolerance=0.01)
    assert 0 < threshold < 1 and measured_density(model) == pytest.approx(0.6, abs=0.01)
    state = model.blocks[0](model.embedding(tokens), rotary(model, 16))
    top = model.head(model.norm(state)).softmax(-1).topk(2).values
    sure = top[..., 0] - top[..., 1] >= 1 - threshold
    model(tokens)
    assert torch.equal(model.blocks[1].ran, ~sure)
    assert model.n_parameters() == small().n_parameters(), "norm and head are borrowed"


def test_the_early_exit_loss_is_calms_average():
    model, tokens = small(), text(2, 9)
    found, x = early_exit.early_exit_loss(model, tokens), model.embedding(tokens[:, :-1])
    expected = 0
    for weight, block in zip((1 / 6, 2 / 6, 3 / 6), model.blocks):
        x = block(x, rotary(model, 8))
        logits = model.head(model.norm(x))
        expected += weight * F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not any(block._forward_hooks for block in model.blocks)


def test_a_copy_borrows_its_own_norm_and_head():
    model = early_exit.add_confidence_exits(small()).eval()
    calibrate(model, text(8, 30), 0.6, tolerance=0.01)
    twin = copy.deepcopy(model)
    assert twin.blocks[1].router.borrowed == (twin.norm, twin.head)
    assert twin.blocks[2].before[0] is twin.blocks[1]
    fresh = early_exit.add_confidence_exits(small(seed=1)).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(text(2, 9)), twin(text(2, 9))), "thresholds are saved"


def test_layers_that_cannot_be_left_are_out_of_reach():
    model = early_exit.add_confidence_exits(small())
    with pytest.raises(ValueError, match=r"0\.2 is out of reach: thresholds give 0\.333 to 1\.000"):
        calibrate(model, text(4, 16), 0.2)
    with pytest.raises(ValueError, match="has routers already"):
        early_exit.add_confidence_exits(model)
