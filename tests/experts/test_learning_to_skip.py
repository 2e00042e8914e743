import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from lablib.exercises import learning_to_skip as exercises
from lablib.experts import learning_to_skip as lts
from lablib.models import GPT, GPTConfig
from lablib.models.flops import flops_per_token
from lablib.models.gpt import rotary_table
from lablib.training import next_token_loss
from lablib.training.losses import auxiliary_loss


def small(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
    return GPT(GPTConfig(**sizes, max_length=64, init_std=0.2, qk_norm=True, **options))


def text(*shape, seed=0):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def by_the_equation(model, tokens, gates):
    """Logits by G f(x) + (1 - G) x, f the plain block; gates: one (batch, length) a layer."""
    x = model.embedding(tokens)
    rotary = rotary_table(model.config, 0, tokens.shape[1], x)
    for skip, gate in zip(model.blocks, gates):
        if callable(gate):
            gate = gate(skip, x)
        gate = gate[..., None]
        x = gate * skip.block(x, rotary) + (1 - gate) * x
    return model.head(model.norm(x))


def drawn(skip, x):
    """The straight-through gate, from the global generator."""
    logits = skip.block.attention_norm(x) @ skip.router.weight.t()
    soft = F.gumbel_softmax(logits)
    hard = F.one_hot(soft.argmax(-1), 2).float()
    return (hard + soft - soft.detach())[..., 1]


def detached_where_skipped(skip, x):
    gate = drawn(skip, x)
    return gate * (gate.detach() > 0.5)


def all_gradients(model, logits):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((logits * weight).sum(), list(model.parameters()))


def test_running_everything_is_the_model_itself_and_skipping_everything_its_embedding():
    model, tokens = small().eval(), text(2, 11)
    dense, embedded = model(tokens), model.head(model.norm(model.embedding(tokens)))
    lts.add_routers(model, 0.5).eval()
    lts.set_threshold(model, -1e9)
    assert torch.allclose(model(tokens), dense, atol=1e-5) and lts.measured_density(model) == 1
    lts.set_threshold(model, 1e9)
    assert torch.allclose(model(tokens), embedded, atol=1e-6) and lts.measured_density(model) == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 17)])
def test_at_inference_kept_rows_alone_give_what_the_equation_gives(shape):
    model, tokens = lts.add_routers(small(), 0.5).eval(), text(*shape)
    lts.calibrate(model, text(8, 30, seed=1), 0.5, tolerance=0.01)
    compact = model(tokens)
    ran = [block.ran for block in model.blocks]
    assert torch.allclose(
        compact, by_the_equation(model, tokens, [m.float() for m in ran]), atol=1e-5
    )
    for block in model.blocks:
        block.compact = "never"
    assert torch.allclose(model(tokens), compact, atol=1e-5)
    assert all(torch.equal(block.ran, before) for block, before in zip(model.blocks, ran))


@pytest.mark.parametrize(
    ("compact", "gate"),
    [("inference", drawn), ("never", drawn), ("always", detached_where_skipped)],
)
def test_in_training_outputs_and_every_gradient_are_those_of_the_equation(compact, gate):
    """Compact training, and it alone, gives a skipped token's router no gradient."""
    model, tokens = lts.add_routers(small(), 0.5, compact=compact), text(3, 13)
    torch.manual_seed(5)
    ours = model(tokens)
    assert 0.1 < lts.measured_density(model) < 0.9
    torch.manual_seed(5)  # the same Gumbel draws, layer by layer
    theirs = by_the_equation(model, tokens, [gate] * 3)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for found, expected in zip(all_gradients(model, ours), all_gradients(model, theirs)):
        assert torch.allclose(found, expected, atol=1e-3, rtol=1e-4)


def test_a_token_that_skips_tells_its_router_what_it_missed_unless_training_is_compact():
    grads = {}
    for compact in ("inference", "always"):
        model = lts.add_routers(small(), 0.5, compact=compact)
        last, kept = model.blocks[-1], []

        def keep(gate, kept=kept):
            gate.retain_grad()
            kept.append(gate)

        last.router.register_forward_hook(lambda m, args, gate, keep=keep: keep(gate))
        torch.manual_seed(0)
        model(text(4, 16)).square().sum().backward()
        grads[compact] = kept[0].grad[~last.ran]
    assert (grads["inference"] != 0).all() and len(grads["inference"]) > 10
    assert (grads["always"] == 0).all()


@pytest.mark.parametrize("compact", ["inference", "never"])
def test_generation_with_a_cache_equals_generation_without(compact):
    model = lts.add_routers(small(), 0.5, compact=compact).eval()
    lts.calibrate(model, text(8, 30, seed=1), 0.5, tolerance=0.01)
    prompt = text(3, 5)
    full = model.generate(prompt, 20, greedy=True, use_cache=False)
    assert 0 < lts.measured_density(model) < 0.95
    assert torch.equal(model.generate(prompt, 20, greedy=True), full)
    cache = model.new_cache(32)
    steps = [model.hidden_states(prompt[:, :3], cache), model.hidden_states(prompt[:, 3:], cache)]
    assert torch.allclose(torch.cat(steps, 1), model.hidden_states(prompt), atol=1e-5)


def test_a_layer_does_nothing_for_tokens_that_skip_it():
    model, seen = lts.add_routers(small(), 0.5).eval(), []
    lts.calibrate(model, text(8, 30, seed=1), 0.5, tolerance=0.01)
    for block in model.blocks:
        block.block.mlp.up.register_forward_hook(lambda m, args, y: seen.append(args[0].shape[0]))
        block.block.attention.query.register_forward_hook(
            lambda m, args, y: seen.append(args[0].shape[0])
        )
    model(text(4, 16))
    kept = [int(block.ran.sum()) for block in model.blocks]
    assert seen == [count for count in kept for _ in range(2)]
    assert sum(kept) == lts.layers_run(model).sum() < 3 * 64


def test_the_future_is_not_seen():
    model, tokens = lts.add_routers(small(), 0.5).eval(), text(2, 12)
    lts.calibrate(model, text(8, 30, seed=1), 0.5, tolerance=0.01)
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 40
    assert torch.allclose(model(tokens)[:, :7], model(other)[:, :7], atol=1e-5)


def test_the_density_term_is_the_papers():
    model = lts.add_routers(small(), 0.3)
    model(text(4, 16))
    shares = [block.ran.float().mean() for block in model.blocks]
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
    assert lts.measured_density(model) == pytest.approx(0.2, abs=0.06)


def test_routers_stay_in_float32():
    router = lts.SkipRouter(16).to(torch.bfloat16)
    assert router.logits(torch.randn(5, 16, dtype=torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert lts.SkipRouter(16).logits(torch.randn(5, 16)).dtype == torch.float32


def test_routers_are_made_as_asked():
    torch.manual_seed(0)
    model = lts.add_routers(small(), 0.5, std=0.1, temperature=0.7)
    weights = torch.cat([block.router.weight.flatten() for block in model.blocks])
    assert weights.std().item() == pytest.approx(0.1, rel=0.2)
    assert {block.router.temperature for block in model.blocks} == {0.7}


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_calibration_finds_thresholds_of_any_size(target, scale):
    model, tokens = lts.add_routers(small(), 0.5, std=scale), text(16, 32)
    lts.calibrate(model.eval(), tokens, target, tolerance=0.02)
    model(tokens)
    assert lts.measured_density(model) == pytest.approx(target, abs=0.02)


def test_random_routers_skip_at_their_density():
    model = lts.add_random_routers(small(), 0.3)
    torch.manual_seed(0)
    model(text(16, 60))
    assert lts.measured_density(model) == pytest.approx(0.3, abs=0.03)
    next_token_loss(model, text(2, 9)).backward()


def test_set_density_reaches_random_routers_alone():
    model = lts.add_random_routers(small(), 0.3)
    lts.set_density(model, 0.8)
    torch.manual_seed(0)
    model(text(16, 60))
    assert lts.measured_density(model) == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match=r"density 1\.2"):
        lts.set_density(model, 1.2)
    learned = lts.add_routers(small(), 0.3)
    lts.set_density(learned, 0.8)
    assert not any(hasattr(block.router, "density") for block in learned.blocks)


def test_the_matching_density_makes_flops_equal():
    config = GPTConfig(dim=64, n_layers=6, n_heads=4, n_kv_heads=2, vocab_size=256)
    dense = flops_per_token(GPTConfig(**{**vars(config), "n_layers": 3}), 64)
    density = lts.matching_density(config, 64, dense)
    assert lts.skipping_flops(config, 64, density) == pytest.approx(dense)
    assert density < 0.5, "keys and values of all layers have to be paid for"
    with pytest.raises(ValueError, match="FLOPs a token are not within"):
        lts.matching_density(config, 64, 10.0)
    routers = 6 * 2 * 2 * 64  # two logits a token in each layer
    every = lts.skipping_flops(config, 64, 1.0)
    assert every == pytest.approx(flops_per_token(config, 64) + routers)


def test_models_can_be_copied_pickled_and_saved_after_a_step():
    model, tokens = lts.add_routers(small(), 0.5), text(2, 8)
    lts.calibrate(model, text(8, 30), 0.25, tolerance=0.01)
    model(tokens).sum()
    assert model.blocks[0].auxiliary_loss.requires_grad
    copied, pickled = copy.deepcopy(model).eval(), pickle.loads(pickle.dumps(model)).eval()
    assert copied.blocks[0].auxiliary_loss is None
    assert torch.equal(copied(tokens), pickled(tokens))
    fresh = lts.add_routers(small(seed=1), 0.5).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(tokens), copied(tokens)), "thresholds are saved, too"
    fresh(text(8, 30))
    assert lts.measured_density(fresh) == pytest.approx(0.25, abs=0.01)


def test_calibration_keeps_every_modules_mode():
    model = lts.add_routers(small(), 0.5)
    model.blocks[1].eval()
    lts.calibrate(model, text(8, 30), 0.5, tolerance=0.01)
    assert model.training and model.blocks[0].router.training and not model.blocks[1].training


def test_a_density_that_no_threshold_reaches_is_refused_and_a_near_miss_said():
    model = lts.add_routers(small(), 0.5)
    for block in model.blocks:
        block.router.threshold.fill_(float("-inf"))
        block.router.weight.data.zero_()  # all margins are 0: all tokens go alike
    with pytest.warns(UserWarning, match="nearest density to 0.4 is 0.400 off"):
        lts.calibrate(model, text(4, 16), 0.4)
    assert lts.measured_density(model) == 0
    mixed = small()
    mixed.blocks[1] = lts.SkipBlock(mixed.blocks[1], lts.SkipRouter(32))
    mixed.blocks[1].router.threshold.fill_(0.3)
    with pytest.raises(ValueError, match=r"0\.5 is out of reach: thresholds give 0\.667 to 1\.000"):
        lts.calibrate(mixed, text(4, 16), 0.5)
    assert mixed.blocks[1].router.threshold.item() == pytest.approx(0.3)


@pytest.mark.parametrize("density", [5.0, -0.5, float("nan")])
def test_shares_outside_0_and_1_are_refused(density):
    config, model = GPTConfig(dim=64), lts.add_routers(small(), 0.5)
    for refuse in (
        lambda: lts.add_routers(small(), density),
        lambda: lts.add_random_routers(small(), density),
        lambda: lts.set_density(model, density),
        lambda: lts.calibrate(model, text(2, 8), density),
        lambda: lts.skipping_flops(config, 8, density),
    ):
        with pytest.raises(ValueError, match=f"density {density} is the share"):
            refuse()


@pytest.mark.parametrize("compact", ["always", "never"])
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


def test_what_makes_no_sense_is_refused_and_changes_nothing():
    model = lts.add_routers(small(), 0.5)
    before = list(model.blocks)
    for again in (lts.add_routers, lts.add_random_routers):
        with pytest.raises(ValueError, match="has routers already"):
            again(model, 0.5)
    assert list(model.blocks) == before
    plain = small()
    with pytest.raises(ValueError, match="'sometimes' is none of"):
        lts.add_routers(plain, 0.5, compact="sometimes")
    assert not any(isinstance(block, lts.SkipBlock) for block in plain.blocks)


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
