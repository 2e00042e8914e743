import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from lablib import resources
from lablib.exercises import learning_to_skip as exercises
from lablib.experts import learning_to_skip as lts
from lablib.models import GPT, GPTConfig
from lablib.training import next_token_loss
from lablib.training.losses import auxiliary_loss


def small(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
    return GPT(GPTConfig(**sizes, max_length=64, init_std=0.2, qk_norm=True, **options))


def text(*shape, seed=0):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def masked_block(block, x, rotary, gate):
    """f(x) for everybody, then G f(x) + (1 - G) x: the equation, without any compaction."""
    attended = x + block.attention(block.attention_norm(x), rotary)
    after = attended + block.mlp(block.mlp_norm(attended))
    return gate[..., None] * after + (1 - gate[..., None]) * x


def masked_model(model, tokens, gates):
    from lablib.models.gpt import rotary_table

    x = model.embedding(tokens)
    rotary = rotary_table(model.config, 0, tokens.shape[1], x)
    for wrapped, gate in zip(model.blocks, gates):
        x = masked_block(wrapped.block, x, rotary, gate)
    return model.head(model.norm(x))


def test_running_everything_is_the_model_itself_and_skipping_everything_its_embedding():
    model, tokens = small().eval(), text(2, 11)
    dense, embedded = model(tokens), model.head(model.norm(model.embedding(tokens)))
    lts.add_routers(model, 0.5).eval()
    lts.set_threshold(model, -1e9)
    assert torch.allclose(model(tokens), dense, atol=1e-5) and lts.density(model) == 1
    lts.set_threshold(model, 1e9)
    assert torch.allclose(model(tokens), embedded, atol=1e-6) and lts.density(model) == 0


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 17)])
def test_compaction_equals_the_masked_computation(shape, apart):
    model, tokens = lts.add_routers(small(), 0.5, apart=apart).eval(), text(*shape)
    lts.calibrate(model, text(4, 16, seed=1), 0.5)
    compact = model(tokens)
    masks = [choice.mask for block in model.blocks for choice in block.choices]
    for block in model.blocks:
        block.compact = False
    assert torch.allclose(model(tokens), compact, atol=1e-5)
    again = [choice.mask for block in model.blocks for choice in block.choices]
    assert all(torch.equal(a, b) for a, b in zip(masks, again))
    if not apart:
        expected = masked_model(model, tokens, [mask.float() for mask in masks])
        assert torch.allclose(compact, expected, atol=1e-5)


def test_every_gradient_equals_that_of_the_masked_computation():
    model, tokens = lts.add_routers(small(), 0.5), text(3, 13)
    weight = torch.randn(3, 13, 40, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    (model(tokens) * weight).sum().backward()
    compact = {name: p.grad.clone() for name, p in model.named_parameters()}
    masks = [block.choices[0].mask for block in model.blocks]
    model.zero_grad()
    torch.manual_seed(5)  # the same Gumbel draws, layer by layer
    x = model.embedding(tokens)
    from lablib.models.gpt import rotary_table

    rotary = rotary_table(model.config, 0, 13, x)
    for wrapped, mask in zip(model.blocks, masks):
        logits = wrapped.router.logits(wrapped.block.attention_norm(x))
        gate = F.gumbel_softmax(logits, hard=True)[..., 1]
        assert torch.equal(gate > 0.5, mask)
        # A token that skips gives its router no gradient.
        x = masked_block(wrapped.block, x, rotary, gate * mask)
    (model.head(model.norm(x)) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, compact[name], atol=1e-3, rtol=1e-4), name
    assert all(compact[f"blocks.{i}.router.weight"].abs().sum() > 0 for i in range(3))


@pytest.mark.parametrize("training", [True, False])
def test_masked_logits_follow_the_equation_and_compute_every_row(training):
    model, tokens, rows = lts.add_routers(small(), 0.5).train(training), text(3, 13), []
    torch.manual_seed(5)
    compact = model(tokens)
    masks = [block.choices[0].mask.float() for block in model.blocks]
    assert 0 < sum(mask.sum() for mask in masks) < 3 * tokens.numel()
    found = torch.autograd.grad(compact.square().sum(), list(model.parameters()), allow_unused=True)
    for block in model.blocks:
        block.block.mlp.up.register_forward_hook(lambda m, args, y: rows.append(y[..., 0].numel()))
    torch.manual_seed(5)
    masked = lts.masked_logits(model, tokens)
    assert rows == [tokens.numel()] * 3
    assert torch.allclose(masked, masked_model(model, tokens, masks), atol=1e-5)
    grads = torch.autograd.grad(masked.square().sum(), list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(found, grads):
        assert (ours is None and theirs is None) or torch.allclose(ours, theirs, 1e-4, 1e-3)


def test_masked_logits_know_routers_without_a_gate_and_refuse_what_they_do_not_know():
    model, tokens = lts.add_random_routers(small(), 0.5), text(2, 9)
    torch.manual_seed(0)
    expected = model(tokens)
    torch.manual_seed(0)
    assert torch.allclose(lts.masked_logits(model, tokens), expected, atol=1e-5)
    for option in ("apart", "exits"):
        with pytest.raises(ValueError, match="one router and without early exit"):
            lts.masked_logits(lts.add_routers(small(), 0.5, **{option: True}), tokens)


def test_without_compaction_skipped_tokens_reach_the_router():
    grads = []
    for compact in (True, False):
        model = lts.add_routers(small(), 0.5, compact=compact)
        torch.manual_seed(0)
        model(text(2, 8)).square().sum().backward()
        grads.append(model.blocks[-1].router.weight.grad)
    assert not torch.allclose(*grads, rtol=1e-2)


@pytest.mark.parametrize("options", [{}, {"apart": True}, {"exits": True}])
def test_generation_with_a_cache_equals_generation_without(options):
    model = lts.add_routers(small(), 0.5, **options).eval()
    lts.calibrate(model, text(4, 16, seed=1), 0.5)
    prompt = text(3, 5)
    full = model.generate(prompt, 20, greedy=True, use_cache=False)
    assert 0 < lts.density(model) < 0.95
    assert torch.equal(model.generate(prompt, 20, greedy=True), full)
    cache = model.new_cache(32)
    steps = [model.hidden_states(prompt[:, :3], cache), model.hidden_states(prompt[:, 3:], cache)]
    assert torch.allclose(torch.cat(steps, 1), model.hidden_states(prompt), atol=1e-5)


def test_a_layer_does_nothing_for_tokens_that_skip_it():
    model, seen = lts.add_routers(small(), 0.5).eval(), []
    lts.calibrate(model, text(4, 16, seed=1), 0.5)
    for block in model.blocks:
        block.block.mlp.up.register_forward_hook(lambda m, args, y: seen.append(args[0].shape[0]))
        block.block.attention.query.register_forward_hook(
            lambda m, args, y: seen.append(args[0].shape[0])
        )
    model(text(4, 16))
    kept = [int(block.choices[0].mask.sum()) for block in model.blocks]
    assert seen == [count for count in kept for _ in range(2)]
    assert sum(kept) == lts.layers_run(model).sum() < 3 * 64


def test_the_future_is_not_seen():
    model, tokens = lts.add_routers(small(), 0.5).eval(), text(2, 12)
    lts.calibrate(model, text(4, 16, seed=1), 0.5)
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 40
    assert torch.allclose(model(tokens)[:, :7], model(other)[:, :7], atol=1e-5)


def test_the_density_term_is_the_papers():
    model = lts.add_routers(small(), 0.3)
    model(text(4, 16))
    shares = [block.choices[0].mask.float().mean() for block in model.blocks]
    expected = 0.1 * sum((share - 0.3) ** 2 for share in shares)
    assert auxiliary_loss(model).item() == pytest.approx(expected.item(), rel=1e-4)
    assert auxiliary_loss(model) == 0, "taken once"
    model.eval()(text(4, 16))
    assert auxiliary_loss(model) == 0, "training alone has it"


def test_the_density_term_alone_leads_the_routers_to_the_target():
    model, tokens = lts.add_routers(small(), 0.2, weight=1.0), text(8, 32)
    routers = [block.router.weight for block in model.blocks]
    optimizer = torch.optim.AdamW(routers, 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens)
        auxiliary_loss(model).backward()
        optimizer.step()
    assert lts.density(model) == pytest.approx(0.2, abs=0.06)


def test_routers_stay_in_float32():
    router = lts.Router(16).to(torch.bfloat16)
    assert router.logits(torch.randn(5, 16, dtype=torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert lts.Router(16).logits(torch.randn(5, 16)).dtype == torch.float32


def test_a_token_that_exits_stays_out():
    model = lts.add_routers(small(), 0.5, exits=True).eval()
    lts.calibrate(model, text(4, 16), 0.5)
    model(text(4, 16))
    masks = torch.stack([block.choices[0].mask for block in model.blocks]).int()
    assert (masks.diff(dim=0) <= 0).all() and 0 < masks.sum() < masks.numel()


def test_confidence_exits_stop_where_the_prediction_is_clear():
    model, tokens = lts.add_confidence_exits(small()).eval(), text(4, 16)
    lts.set_threshold(model, 0.0)
    model(tokens)
    assert lts.density(model) == 1, "no prediction is certain"
    threshold = lts.calibrate(model, tokens, 0.6)
    assert 0 < threshold < 1 and lts.density(model) == pytest.approx(0.6, abs=0.05)
    state = model.blocks[0](model.embedding(tokens), lts_rotary(model, 16))
    top = model.head(model.norm(state)).softmax(-1).topk(2).values
    sure = top[..., 0] - top[..., 1] >= 1 - threshold
    model(tokens)
    assert torch.equal(model.blocks[1].choices[0].mask, ~sure)
    assert model.n_parameters() == small().n_parameters(), "norm and head are borrowed"


def lts_rotary(model, length):
    from lablib.models.gpt import rotary_table

    return rotary_table(model.config, 0, length, model.embedding.weight)


def test_the_early_exit_loss_is_calms_average():
    model, tokens = small(), text(2, 9)
    found, x = lts.early_exit_loss(model, tokens), model.embedding(tokens[:, :-1])
    expected = 0
    for weight, block in zip((1 / 6, 2 / 6, 3 / 6), model.blocks):
        x = block(x, lts_rotary(model, 8))
        logits = model.head(model.norm(x))
        expected += weight * F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not any(block._forward_hooks for block in model.blocks)


def test_random_routers_skip_at_their_density():
    model = lts.add_random_routers(small(), 0.3)
    torch.manual_seed(0)
    model(text(16, 60))
    assert lts.density(model) == pytest.approx(0.3, abs=0.03)
    next_token_loss(model, text(2, 9)).backward()


def test_set_density_reaches_random_routers_alone():
    model = lts.add_random_routers(small(), 0.3)
    lts.set_density(model, 0.8)
    torch.manual_seed(0)
    model(text(16, 60))
    assert lts.density(model) == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match=r"density 1\.2"):
        lts.set_density(model, 1.2)
    learned = lts.add_routers(small(), 0.3)
    lts.set_density(learned, 0.8)
    assert not any(hasattr(block.router, "density") for block in learned.blocks)


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
    model, clock = small(), [("start", 0, 0, 0.0)]
    own = list(model.blocks)
    monkeypatch.setattr(resources, "_clock", lambda: clock[-1][-1])
    # The prompt, the step that is not counted, then three that are.
    slow = Sleeper(clock, "slow", [100, 50, 7, 3, 4])
    fast = Sleeper(clock, "fast", [100, 50, 1, 1, 2])
    found = lts.decoding_seconds(model, [[slow], [fast]], text(2, 6), steps=3)
    assert found == [4, 1]
    assert [row[:3] for row in clock[1:]] == [
        (name, new, seen)
        for new, seen in [(6, 6), (1, 7), (1, 8), (1, 9), (1, 10)]
        for name in ("slow", "fast")
    ]
    assert list(model.blocks) == own
    with pytest.raises(ValueError, match="0 steps"):
        lts.decoding_seconds(model, [own], text(2, 6), steps=0)
    with pytest.raises(IndexError):
        lts.decoding_seconds(model, [[slow]], text(2, 6), steps=3)
    assert list(model.blocks) == own, "also after an error"


def test_leaving_out_a_block_is_the_model_without_it():
    model, tokens = small(), text(2, 9)
    whole, losses = lts.leave_one_out_losses(model, tokens)
    blocks = list(model.blocks)
    assert whole == pytest.approx(next_token_loss(model, tokens).item(), rel=1e-5)
    for place, loss in enumerate(losses):
        model.blocks = torch.nn.ModuleList(blocks[:place] + blocks[place + 1 :])
        assert loss == pytest.approx(next_token_loss(model, tokens).item(), rel=1e-5)
    assert len({round(loss, 4) for loss in (whole, *losses)}) == len(blocks) + 1


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_flops_equal_a_count_of_every_product(kv):
    sizes = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": kv, "vocab_size": 40}
    model = GPT(GPTConfig(**sizes, max_length=64))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(text(1, 1))
    # Attention's two products with one key: the counter may not know the fused kernel.
    known = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in known.items() if "attention" not in str(op))
    scores = 3 * 2 * 2 * 32
    assert lts.flops_per_token(model.config, 1) == pytest.approx(linear + scores)


def test_the_matching_density_makes_flops_equal():
    config = GPTConfig(dim=64, n_layers=6, n_heads=4, n_kv_heads=2, vocab_size=256)
    dense = lts.flops_per_token(GPTConfig(**{**vars(config), "n_layers": 3}), 64)
    density = lts.matching_density(config, 64, dense)
    assert lts.flops_per_token(config, 64, density, routed=True) == pytest.approx(dense)
    assert density < 0.5, "keys and values of all layers have to be paid for"
    with pytest.raises(ValueError, match="FLOPs a token are not within"):
        lts.matching_density(config, 64, 10.0)


def test_models_can_be_copied_pickled_and_saved_after_a_step():
    model, tokens = lts.add_routers(small(), 0.5, exits=True), text(2, 8)
    model(tokens).sum()
    copied, pickled = copy.deepcopy(model).eval(), pickle.loads(pickle.dumps(model)).eval()
    assert torch.equal(copied(tokens), pickled(tokens))
    assert copied.blocks[1].after is copied.blocks[0]
    fresh = lts.add_routers(small(seed=1), 0.5, exits=True).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(tokens), copied(tokens))


@pytest.mark.parametrize("compact", [True, False])
def test_autocast_changes_little(compact):
    model, tokens = lts.add_routers(small(), 1.0, compact=compact), text(2, 9)
    lts.set_threshold(model.eval(), -1e9)
    full = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens)
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(tokens).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_fit_trains_it():
    from lablib.data import Batches
    from lablib.training import fit

    model = lts.add_routers(small(), 0.5)
    history = fit(model, Batches(text(2000) % 4, 8, 16), steps=30, lr=1e-2, progress=False)
    assert history.losses[-1] < history.losses[0] - 0.5


def test_a_llama_of_transformers_skips_through_from_hf():
    transformers = pytest.importorskip("transformers")
    from lablib.models import from_hf

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    with pytest.raises(TypeError, match="from_hf"):
        lts.add_random_routers(theirs, 0.5)
    ours = lts.add_routers(from_hf(theirs), 0.5).eval()
    lts.set_threshold(ours, -1e9)
    assert torch.allclose(ours(text(2, 8)), theirs(text(2, 8)).logits, atol=1e-4)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"density 1\.5"):
        lts.add_routers(small(), 1.5)
    with pytest.raises(ValueError, match="exclude each other"):
        lts.add_routers(small(), 0.5, apart=True, exits=True)


WRONG = {
    "equal_density": [
        lambda n, layers, always, skippable: n / layers,
        lambda n, layers, always, skippable: n * skippable / layers / (always + skippable),
        lambda n, layers, always, skippable: 1.0,
    ],
    "straight_through": [
        lambda margin, noise: (margin + noise > 0).float(),
        lambda margin, noise: (margin + noise).sigmoid(),
        lambda margin, noise: (margin + noise > 0).float() + margin - margin.detach(),
        lambda margin, noise: (margin > 0).float() + margin.sigmoid() - margin.sigmoid().detach(),
    ],
    "skip_layer": [
        lambda x, mask, layer: torch.where(mask[:, None], layer(x), x),
        lambda x, mask, layer: layer(x[mask]),
        lambda x, mask, layer: layer(x * mask[:, None]),
        lambda x, mask, layer: x.index_put_((mask.nonzero()[:, 0],), layer(x[mask])),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
