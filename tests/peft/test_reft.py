import copy

import pytest
import torch
from families_for_tests import MODELS, TOKENS, loads_again, moved

from lablib.models import anatomy
from lablib.peft.adapter import (
    adapters,
    disabled,
    freeze_base_,
    merge_,
    n_trainable,
    remove_,
    trainable,
)
from lablib.peft.lora import lora_
from lablib.peft.reft import ReFT, reft_


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_it_can_start_as_the_base_and_leaves_nothing(model, everywhere, direct, tmp_path):
    plain = copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    reft_(model, 3, 2, 1, everywhere, direct=direct, start="base")
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before)
    freeze_base_(model)
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asking == set(trainable(model)) and len(asking) == 2 * 3
    changed = anatomy.logits(moved(model, 0.3), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    assert torch.equal(anatomy.logits(copy.deepcopy(model), TOKENS), changed)
    loads_again(model, plain, changed, tmp_path)
    with pytest.raises(ValueError, match="can't be merged"):
        merge_(model)
    remove_(model)
    assert not adapters(model) and torch.equal(anatomy.logits(model, TOKENS), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_papers_start_is_not_the_base(model):
    before = anatomy.logits(model, TOKENS)
    reft_(model)
    assert (anatomy.logits(model, TOKENS) - before).abs().max() > 1e-3


def trained(dim=16, rank=3, **options):
    torch.manual_seed(0)
    reft = ReFT(dim, rank, **options).double()
    for parameter in reft.parameters():
        parameter.data.normal_()
    return reft


def test_the_rows_stay_orthonormal_and_start_as_they_were_drawn():
    torch.manual_seed(0)
    start = ReFT(16, 3)
    torch.testing.assert_close(start.rows(), start.free.detach())
    rows = trained().rows()
    torch.testing.assert_close(rows @ rows.T, torch.eye(3).double())
    free = trained().free
    torch.testing.assert_close(free @ rows.T @ rows, free)  # the same subspace


def test_the_subspace_gets_its_target_and_the_rest_of_h_stays():
    reft, h = trained(), torch.randn(2, 5, 16).double()
    rows, edited = reft.rows(), reft.edit(h)
    wanted = h @ reft.target.weight.T + reft.target.bias
    torch.testing.assert_close(edited @ rows.T, wanted)
    rest = torch.eye(16).double() - rows.T @ rows
    torch.testing.assert_close(edited @ rest, h @ rest)


def test_direct_adds_the_target_to_what_is_there():
    reft, h = trained(direct=True), torch.randn(2, 5, 16).double()
    rows = reft.rows()
    wanted = h @ rows.T + h @ reft.target.weight.T + reft.target.bias
    torch.testing.assert_close(reft.edit(h) @ rows.T, wanted)


@pytest.mark.parametrize("direct", [False, True])
def test_gradients_are_those_of_finite_differences(direct):
    reft, h = trained(6, 2, direct=direct), torch.randn(3, 6).double()
    names = [n for n, _ in reft.named_parameters()]

    def function(h, *values):
        by_name = dict(zip(names, values, strict=True))
        return torch.func.functional_call(
            Edit(reft), {f"reft.{n}": v for n, v in by_name.items()}, h
        )

    values = [p.detach().clone().requires_grad_() for p in reft.parameters()]
    assert torch.autograd.gradcheck(function, (h.requires_grad_(), *values))


class Edit(torch.nn.Module):
    def __init__(self, reft):
        super().__init__()
        self.reft = reft

    def forward(self, h):
        return self.reft.edit(h)


def test_which_positions():
    def edited(length, seen=0, first=2, last=1):
        return ReFT(8, 1, first, last).places(length, seen).nonzero().flatten().tolist()

    assert edited(5) == [0, 1, 4]
    assert edited(2) == [0, 1] and edited(1) == [0]  # each once
    assert edited(3, first=0, last=2) == [1, 2]
    assert edited(3, seen=1) == [0]  # the second of the text, and no last ones
    assert edited(3, seen=7) == []


def test_only_those_positions_change_after_the_blocks_that_were_chosen(model):
    seen = {}
    for i, block in enumerate(anatomy.blocks(model)):
        block.register_forward_hook(lambda m, args, out, i=i: seen.update({i: out}))
    anatomy.logits(model, TOKENS)
    before = dict(seen)
    reft_(model, 3, 2, 1, blocks=[1])
    moved(model, 0.3)
    anatomy.blocks(model)[1].register_forward_hook(lambda m, args, out: seen.update({1: out}))
    anatomy.logits(model, TOKENS)
    assert torch.equal(seen[0], before[0])
    same = (seen[1] == before[1]).all(-1).all(0)
    assert same.tolist() == [False, False, True, True, True, True, False]
    reft = anatomy.blocks(model)[1].reft
    for row in range(2):
        for position in (0, 1, 6):
            h = before[1][row, position]
            rows = reft.rows()
            by_hand = reft.target.weight @ h + reft.target.bias - rows @ h
            torch.testing.assert_close(seen[1][row, position], h + rows.T @ by_hand)


def test_counts(model):
    reft_(model, 3)
    assert n_trainable(model) == 2 * (2 * 3 * 32 + 3)


def _in_two(model, tokens, at):
    """Logits of the first `at` tokens in one call and of each later one in a call of its own."""
    if hasattr(model, "new_cache"):
        cache = model.new_cache(16)
        parts = [model(tokens[:, :at], cache)]
        parts += [model(tokens[:, i : i + 1], cache) for i in range(at, tokens.shape[1])]
        return torch.cat(parts, 1)
    out = model(tokens[:, :at], use_cache=True)
    parts = [out.logits]
    for i in range(at, tokens.shape[1]):
        out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", ["gpt", "llama", "gpt2"])
@pytest.mark.parametrize("positions", [{"everywhere": True}, {"first": 2, "last": 0}])
def test_a_cache_changes_nothing_at_all_positions_and_at_the_first(family, positions):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    reft_(model, 3, **positions)
    moved(model, 0.3)
    whole = anatomy.logits(model, TOKENS)
    torch.testing.assert_close(_in_two(model, TOKENS, 4), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(_in_two(model, TOKENS, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt", "llama", "gpt2"])
def test_the_last_positions_under_a_cache_are_the_prompts(family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    reft_(model, 3, 1, 2)
    moved(model, 0.3)
    made = _in_two(model, TOKENS, 4)
    torch.testing.assert_close(made[:, :4], anatomy.logits(model, TOKENS[:, :4]))
    for block in anatomy.blocks(model):  # the same positions of the whole text
        block.reft.places = lambda length, seen=0: torch.tensor([1, 0, 1, 1, 0, 0, 0]).bool()
    torch.testing.assert_close(made, anatomy.logits(model, TOKENS), atol=1e-5, rtol=1e-5)


def test_it_goes_with_bfloat16_and_lora():
    torch.manual_seed(0)
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    before = model(TOKENS)
    lora_(model, ["output", "down"], rank=2)
    reft_(model, 3, start="base")
    torch.testing.assert_close(model(TOKENS), before, atol=0.02, rtol=0.05)
    changed = moved(model, 0.3)(TOKENS)
    assert changed.dtype == torch.bfloat16 and not torch.equal(changed, before)
    changed.float().square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in trainable(model).values())
    remove_(model)
    assert torch.equal(model(TOKENS), before)


def test_what_is_wrong_is_said():
    model = MODELS["gpt"]()
    with pytest.raises(ValueError, match="rank 33 is not 1 to 32"):
        reft_(model, 33)
    with pytest.raises(ValueError, match="'zero' is none of random, base"):
        reft_(model, start="zero")
    with pytest.raises(ValueError, match="no position is edited"):
        reft_(model, first=0, last=0)
    reft_(model, blocks=[1])
    with pytest.raises(ValueError, match="block 1 has a ReFT already"):
        reft_(model)
