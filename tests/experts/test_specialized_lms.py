import math

import numpy as np
import pytest
import torch

from lablib.exercises import specialized_lms as exercises
from lablib.experts import specialized_lms as sl
from lablib.models import GPT, GPTConfig
from lablib.training import evaluate


def small(**options):
    torch.manual_seed(2)
    sizes = {"vocab_size": 30, "dim": 8, "n_layers": 2, "n_heads": 2, "max_length": 64}
    return GPT(GPTConfig(**sizes | {"init_std": 0.2} | options))


def world(n, shares, seed=0):
    """Documents of known kinds: (n,) the kind of each, drawn with these shares."""
    return np.random.default_rng(seed).choice(len(shares), n, p=shares)


def test_importance_weights_are_the_density_ratio_of_a_known_world():
    generic_shares, special_shares = [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]
    generic, special = world(200_000, generic_shares), world(50_000, special_shares, 1)
    weights = sl.importance_weights(generic, special, 3)
    ratio = np.array(special_shares) / generic_shares
    assert weights == pytest.approx(ratio[generic], rel=0.05)
    assert weights.mean() == pytest.approx(1.0)
    # The weighted mean of any function of generic documents is its mean over special ones.
    value = np.array([3.0, -1.0, 7.0])
    expected = (value * np.bincount(special, minlength=3) / len(special)).sum()
    assert (weights * value[generic]).mean() == pytest.approx(expected)


def test_kinds_that_the_special_domain_lacks_have_no_weight():
    weights = sl.importance_weights(np.array([0, 0, 1, 2]), np.array([0, 1]), 3)
    assert weights.tolist() == [1.0, 1.0, 2.0, 0.0]


def test_resampling_follows_the_weights():
    documents = np.repeat(np.arange(4)[:, None], 5, axis=1)
    ids = sl.resampled(documents, np.array([0.0, 1.0, 3.0, 0.0]), 4000)
    assert ids.shape == (20_000,) and set(ids) == {1, 2}
    assert (ids == 2).mean() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(("k", "h", "m"), [(4, 4, 8), (3, 2, 5), (2, 5, 1)])
def test_projected_weights_are_the_sums_of_the_definition(k, h, m):
    layer = sl.ProjectedLinear(3, 4, h, m)
    experts = torch.randn(k, m)
    made = layer.weights(experts)
    for i, a, b in ((0, 0, 0), (k - 1, 3, 2), (1, 2, 1)):
        total = sum(
            experts[i, q] * layer.mixing[q, r] * layer.table[r, a, b]
            for q in range(m)
            for r in range(h)
        )
        torch.testing.assert_close(made[i, a, b], total)
    x = torch.randn(k, 6, 3)
    torch.testing.assert_close(layer(x, experts)[1], x[1] @ made[1].T)


def test_an_instance_is_the_network_on_its_own_cluster():
    network = sl.ProjectedNetwork(small(), n_experts=3, capacity=2)
    tokens = torch.randint(30, (6, 10))  # two rows of each cluster
    logits = network(tokens)
    for expert in range(3):
        instance = network.instance(expert)
        rows = tokens[2 * expert : 2 * expert + 2]
        torch.testing.assert_close(instance(rows), logits[2 * expert : 2 * expert + 2])
        assert instance.n_parameters() == small().n_parameters()
    other = network.instance(0)(tokens[2:4])
    assert not torch.allclose(other, logits[2:4])


def test_a_projected_network_is_larger_by_its_tables():
    plain, network = small(), sl.ProjectedNetwork(small(), n_experts=5, capacity=4, size=3)
    mlp = 3 * 8 * plain.config.ffn_dim * 2
    extra = 5 * 3 + 2 * 3 * 3 * 4  # E, and M of six layers
    assert sum(p.numel() for p in network.parameters()) == plain.n_parameters() + 3 * mlp + extra


def test_made_weights_start_as_large_as_plain_ones():
    plain = small()
    network = sl.ProjectedNetwork(plain, n_experts=4)
    layer = network.small.blocks[1].mlp.gate
    made = layer.weights(network.experts)
    assert made.std().item() == pytest.approx(
        plain.blocks[1].mlp.gate.weight.std().item(), rel=1e-4
    )


def test_a_hard_mixture_is_a_projected_network_of_unit_vectors():
    layer = sl.ProjectedLinear(3, 4, 3, 3)
    layer.mixing.data = torch.eye(3)
    torch.testing.assert_close(layer.weights(torch.eye(3)), layer.table)


def test_the_matrix_of_a_mean_is_the_mean_of_matrices():
    layer = sl.ProjectedLinear(3, 4, 2, 5)
    experts, pages = torch.randn(3, 5), torch.tensor([2, 1, 1])
    one = layer.weights(exercises._between(experts, pages)[None])[0]
    torch.testing.assert_close(one, (layer.weights(experts) * pages[:, None, None] / 4).sum(0))


def test_batches_hold_rows_of_each_cluster_in_order():
    parts = [np.arange(100 * j, 100 * j + 90) for j in range(3)]
    batch = next(sl.by_cluster(parts, rows=2, length=8, seed=4))
    assert batch.shape == (6, 9)
    assert (batch // 100 == torch.tensor([0, 0, 1, 1, 2, 2])[:, None]).all()


def special(seed=0):
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 6, 3000)
    windows = torch.from_numpy(ids[: 65 * 8].reshape(8, 65)).long()
    return sl.Special(ids[600:], [windows], [windows])


def test_specializing_helps_and_leaves_the_model_as_it_was():
    model, domain = small(), special()
    before = model.embedding.weight.clone()
    tuned = sl.specialize(model, domain, lr=1e-2, rounds=4, steps=5)
    assert evaluate(tuned, domain.test) < evaluate(model, domain.test) - 0.1
    assert torch.equal(model.embedding.weight, before)


def test_specializing_keeps_the_best_and_never_harms_on_what_it_stops_by():
    model = small()
    domain = special()
    foreign = sl.Special(np.full(3000, 29), domain.valid, domain.test)
    tuned = sl.specialize(model, foreign, lr=0.1, rounds=4, steps=3)
    assert evaluate(tuned, domain.valid) == evaluate(model, domain.valid)


def test_total_cost_is_equation_1():
    assert sl.total_cost(100.0, 3.0, 7) == 121.0


def count_positive(weights):
    return float((weights > 0).sum())


def plain_sum(weights):
    return float(weights.sum())


def unnormalized(weights):
    return float(1 / (weights**2).sum())


def absolute(weights):
    return float(weights.sum() / weights.max())


def most_frequent(experts, pages):
    return experts[pages.argmax()].clone()


def plain_mean(experts, pages):
    return experts.mean(0)


def not_shares(experts, pages):
    return pages.float() @ experts


def softmaxed(experts, pages):
    return pages.float().softmax(0) @ experts


def not_whole(generic, special, special_alone):
    if special >= special_alone:
        return math.inf
    return generic / (special_alone - special)


def at_equality(generic, special, special_alone):
    if special >= special_alone:
        return math.inf
    return math.ceil(generic / (special_alone - special))


def forgets_tuning(generic, special, special_alone):
    return math.floor(generic / special_alone) + 1


WRONG = {
    "effective_size": [count_positive, plain_sum, unnormalized, absolute],
    "between": [most_frequent, plain_mean, not_shares, softmaxed],
    "break_even": [not_whole, at_equality, forgets_tuning],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
