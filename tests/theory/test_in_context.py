import numpy as np
import pytest
import torch

from lablib.data import MarkovSource
from lablib.models import GPT, GPTConfig
from lablib.scaling.fits import fit_power_law
from lablib.theory import in_context


def test_frequencies_learn_the_chain_at_the_rate_of_one_over_root_n():
    source = MarkovSource(4, seed=3)
    prompts = np.stack([source.sample(2048, seed=seed) for seed in range(40)])
    predictions = in_context.frequency_predictions(prompts, 4)
    assert np.allclose(predictions.sum(-1), 1)
    risk = in_context.in_context_risk(predictions, prompts, source.transition)
    law = fit_power_law(*in_context.octaves(risk, first=64))
    assert law.exponent == pytest.approx(-0.5, abs=0.06)
    perfect = source.transition[prompts]
    assert in_context.in_context_risk(perfect, prompts, source.transition).max() < 1e-12


def test_frequency_predictions_by_hand():
    found = in_context.frequency_predictions(np.array([[0, 1, 0, 0]]), 2)
    assert np.allclose(found[0], [[1 / 2, 1 / 2], [1 / 2, 1 / 2], [1 / 3, 2 / 3], [1 / 2, 1 / 2]])


def test_symbol_shares_by_hand():
    found = in_context.symbol_share_predictions(np.array([[0, 1, 0]]), 2)
    assert np.allclose(found[0], [[2 / 3, 1 / 3], [1 / 2, 1 / 2], [3 / 5, 2 / 5]])


def test_risks_take_a_chain_a_prompt():
    prompts = np.array([[0, 1], [1, 1]])
    chains = np.array([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.25, 0.75]]])
    sure = np.tile([1.0, 0.0], (2, 2, 1))
    found = in_context.in_context_risk(sure, prompts, chains)
    assert np.allclose(found, [[0.5, 0.0], [0.75, 0.75]])


def test_in_context_predictions_are_the_softmax_over_the_symbols():
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    prompts = np.array([[0, 1, 1], [1, 0, 0]])
    found = in_context.in_context_predictions(lambda tokens: table[tokens], [8, 3], prompts)
    expected = table[[8, 3]][:, [8, 3]].softmax(-1).numpy()[prompts]
    assert np.allclose(found, expected)


def test_a_gpt_computes_the_symbols_logits_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=9, dim=16, n_layers=1, n_heads=2, max_length=16)).eval()
    prompts = np.array([[0, 1, 1, 0]])
    few = in_context.in_context_predictions(model, [8, 3], prompts, separator=5)
    with torch.inference_mode():
        every = in_context.in_context_predictions(lambda t: model(t), [8, 3], prompts, separator=5)
    assert np.allclose(few, every, atol=1e-6)


def test_a_separator_is_read_before_each_prediction():
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))

    def model(tokens):  # two tokens back and the last one, so the separator matters
        before = torch.nn.functional.pad(tokens, (1, 0))[:, :-1]
        return table[before] + 2 * table[tokens]

    prompts = np.array([[0, 1, 1]])
    found = in_context.in_context_predictions(model, [8, 3], prompts, separator=5)
    expected = (table[[8, 3, 3]] + 2 * table[5])[:, [8, 3]].softmax(-1).numpy()
    assert np.allclose(found[0], expected)


def test_octaves_average_within_doublings():
    centers, means = in_context.octaves(np.arange(1, 65), first=8)
    assert np.allclose(means, [11.5, 23.5, 47.5]) and (np.diff(centers) > 0).all()
    assert len(in_context.octaves(np.arange(63), first=32)[1]) == 1


def broken(tokens):
    return torch.full((*tokens.shape, 9), np.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: in_context.octaves(np.ones(64), 0), "no octave that begins at 0"),
        (lambda: in_context.octaves(np.ones(10), 8), "10 positions hold no octave"),
        (lambda: in_context.frequency_predictions(np.array([[0, 3]]), 3), "not 0 to 2"),
        (lambda: in_context.symbol_share_predictions(np.array([[-1]]), 3), "not 0 to 2"),
        (
            lambda: in_context.in_context_predictions(broken, [8, 3], np.array([[0, 1]])),
            "NaN or infinite",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
