import pytest
import torch

from lablib.models import GPT, GPTConfig, next_token_probabilities

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(50, 32, 2, 4, 2, max_length=40, init_std=0.3)
    return GPT(config)


def test_temperature_divides_logits():
    expected = torch.tensor([0.25, 0.0625, 0.0225, 0.01])
    found = next_token_probabilities(LOGITS, temperature=0.5)
    torch.testing.assert_close(found, expected / expected.sum())


def test_temperature_zero_is_greedy():
    assert next_token_probabilities(LOGITS, temperature=0).tolist() == [1, 0, 0, 0]


def test_top_k_keeps_the_k_most_probable():
    found = next_token_probabilities(LOGITS, top_k=2)
    torch.testing.assert_close(found, torch.tensor([2 / 3, 1 / 3, 0, 0]))


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-60])
def test_a_tiny_temperature_is_as_greedy(temperature):
    logits = 100 * LOGITS
    assert next_token_probabilities(logits, temperature).tolist() == [1, 0, 0, 0]
    masked = torch.tensor([-torch.inf, 2.0, 1.0])
    assert next_token_probabilities(masked, temperature).tolist() == [0, 1, 0]


def test_top_p_of_one_keeps_every_token():
    torch.manual_seed(0)
    logits = torch.randn(20, 5000)
    found = next_token_probabilities(logits, top_p=1.0)
    assert torch.equal(found, next_token_probabilities(logits))


@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 0}, {"seed": 0, "top_k": 3}])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_choose_no_token(options, value):
    broken = GPT(GPTConfig(50, 32, 1, 4, max_length=40))
    with torch.no_grad():
        broken.head.weight[7] = value
    with pytest.raises(ValueError, match="no token can be chosen.*model's weights"):
        broken.generate([1, 2], 3, **options)


@pytest.mark.parametrize(("p", "kept"), [(0.1, 1), (0.49, 1), (0.6, 2), (0.8, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, kept):
    found = next_token_probabilities(LOGITS[[2, 0, 3, 1]], top_p=p)[[1, 3, 0, 2]]
    expected = LOGITS.exp() * (torch.arange(4) < kept)
    torch.testing.assert_close(found, expected / expected.sum())


def test_sampling_follows_the_distribution(model):
    prompt = torch.zeros(20_000, 1, dtype=torch.long)
    drawn = model.generate(prompt, 1, temperature=0.7, top_k=5, seed=1)[:, 1]
    expected = next_token_probabilities(model(prompt[:1])[0, -1], temperature=0.7, top_k=5)
    share = drawn.bincount(minlength=50) / len(prompt)
    assert (share - expected).abs().max() < 0.015


@pytest.mark.parametrize("options", [{"greedy": True}, {"seed": 3}, {"seed": 3, "top_p": 0.8}])
def test_cached_generation_equals_uncached(model, options):
    prompt = torch.randint(50, (3, 4))
    cached = model.generate(prompt, 20, **options)
    assert torch.equal(cached, model.generate(prompt, 20, use_cache=False, **options))
    assert cached.shape == (3, 24) and torch.equal(cached[:, :4], prompt)


def test_greedy_takes_the_largest_logit(model):
    text = model.generate([1, 2, 3], 8, greedy=True)
    for end in range(3, 11):
        assert text[end] == model(text[None, :end])[0, -1].argmax()


def test_a_seed_reproduces_and_leaves_the_global_generator_alone(model):
    torch.manual_seed(5)
    first = model.generate([1], 20, seed=0)
    following = torch.rand(1)
    torch.manual_seed(5)
    assert following == torch.rand(1)
    assert torch.equal(first, model.generate([1], 20, seed=0))
    assert not torch.equal(first, model.generate([1], 20, seed=1))


def test_generation_stops_at_eos_and_rows_stay_there(model):
    prompt = torch.arange(6)[:, None]
    free = model.generate(prompt, 20, seed=2)
    eos = int(free[0, 3])
    text = model.generate(prompt, 20, seed=2, eos=eos)
    at = (text[:, 1:] == eos).int()
    assert torch.equal(at, at.cummax(1).values) and at[0, 2] == 1
    alone = model.generate([0], 20, greedy=True)
    stop = int(alone[2])
    assert len(model.generate([0], 20, greedy=True, eos=stop)) <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature -1 is negative"),
        ({"temperature": float("nan")}, "temperature nan is not finite"),
        ({"temperature": float("inf")}, "temperature inf is not finite"),
        ({"max_new_tokens": -1}, "max_new_tokens -1 is negative"),
        ({"top_k": 0}, "top_k 0 keeps no token"),
        ({"top_p": 1.5}, "top_p 1.5 is not in"),
        ({"max_new_tokens": 40}, "41 tokens are more than the model's max_length 40"),
    ],
)
def test_bad_options_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate([1], **{"max_new_tokens": 2} | options)


def test_an_empty_prompt_is_named(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate([], 2)


def test_the_mode_is_restored(model):
    model.train()
    model.generate([1], 2, seed=0)
    assert model.training
