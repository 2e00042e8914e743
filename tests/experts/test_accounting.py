import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lablib.experts.accounting import energy, flops, parameters
from lablib.experts.moe import MoE, SwiGLUExperts
from lablib.experts.routing import (
    ExpertChoice,
    HashChoice,
    RandomChoice,
    SoftSlots,
    TokenChoice,
    random_table,
)
from lablib.experts.switch_transformers import switch_
from lablib.models import GPT, GPTConfig
from lablib.models.flops import flops_per_token

CONFIG = GPTConfig(vocab_size=64, dim=16, n_layers=3, n_heads=2, max_length=32)


def on_meta(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def with_routers(router):
    """A GPT whose layers have 8 experts behind router()."""
    model = GPT(CONFIG)
    for block in model.blocks:
        block.mlp = MoE(router(), SwiGLUExperts(8, 16, 24))
    return model


def test_dense_models_use_all_they_store():
    model = GPT(CONFIG)
    assert parameters(model) == (model.n_parameters(), model.n_parameters())


@pytest.mark.parametrize(
    ("router", "experts"),
    [
        (lambda: TokenChoice(16, 8, top_k=3), 3),
        (lambda: RandomChoice(8, 2), 2),
        (lambda: HashChoice(random_table(64, 8, 2), 8), 2),
        (lambda: ExpertChoice(16, 8, capacity_factor=1.5), 1.5),
    ],
)
def test_active_parameters_are_those_of_the_experts_that_a_token_meets(router, experts):
    model = with_routers(router)
    one = 3 * 16 * 24  # gate, up, down
    total, active = parameters(model)
    assert total == model.n_parameters()
    assert active == total - 3 * (8 - experts) * one


def test_switch_layers_of_both_kinds():
    model = switch_(GPT(CONFIG), 4, every=1)
    one = sum(p.numel() for p in model.blocks[0].mlp.experts.parameters()) / 4
    assert parameters(model).active == pytest.approx(model.n_parameters() - 3 * 3 * one)


def test_slots_are_refused():
    with pytest.raises(ValueError, match="SoftSlots does not say"):
        parameters(with_routers(lambda: SoftSlots(16, 8)))


def test_published_olmoe_and_mixtral():
    """Counts that the models' own cards print: 6.9B and 1.3B, 46.7B and 12.9B."""
    from transformers import MixtralConfig, OlmoeConfig

    olmoe = parameters(on_meta(OlmoeConfig(intermediate_size=1024)))
    assert olmoe.total == 6_919_161_856
    assert olmoe.active / 1e9 == pytest.approx(1.3, abs=0.05)
    mixtral = parameters(on_meta(MixtralConfig(intermediate_size=14336, num_key_value_heads=8)))
    assert mixtral.total / 1e9 == pytest.approx(46.7, abs=0.05)
    assert mixtral.active / 1e9 == pytest.approx(12.9, abs=0.05)


QWEN = {"vocab_size": 151936, "hidden_size": 2048, "tie_word_embeddings": False}
PUBLISHED = {
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        QWEN
        | {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128}
        | {"num_experts_per_tok": 8},
        (30.5, 3.3),
    ),
    "Qwen1.5-MoE-A2.7B": (
        "Qwen2MoeConfig",
        QWEN
        | {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
        | {"num_experts": 60, "num_experts_per_tok": 4},
        (14.3, 2.7),
    ),
    "DeepSeek-V3": ("DeepseekV3Config", {}, (671, 37)),
    "gpt-oss-20b": (
        "GptOssConfig",
        {"num_hidden_layers": 24, "num_local_experts": 32, "tie_word_embeddings": False},
        (20.9, 3.6),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_mixtures_of_other_families(name):
    """Counts, in billions, that the models' own cards print."""
    import transformers

    kind, sizes, (total, active) = PUBLISHED[name]
    model = on_meta(getattr(transformers, kind)(**sizes))
    ours = parameters(model)
    # That card leaves the table that is looked up out of what is active.
    apart = model.get_input_embeddings().weight.numel() if name == "gpt-oss-20b" else 0
    assert ours.total / 1e9 == pytest.approx(total, rel=0.005)
    assert (ours.active - apart) / 1e9 == pytest.approx(active, abs=0.05, rel=0.02)


def test_flops_of_a_dense_model_are_those_of_its_configuration():
    assert flops(GPT(CONFIG), 32).forward == pytest.approx(flops_per_token(CONFIG, 32))


def test_flops_equal_what_torch_counts():
    """torch counts attention over the whole square: as decoding does after a whole text."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 64}
    config = OlmoeConfig(num_attention_heads=4, num_experts=4, num_experts_per_tok=2, **sizes)
    config._attn_implementation = config._experts_implementation = "eager"
    model = OlmoeForCausalLM(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(64, (1, 24)))
    counted = counter.get_total_flops() / 24
    assert flops(model, 24).decoding == pytest.approx(counted, rel=0.01)
    assert flops(model, 24).training == 3 * flops(model, 24).forward


def test_energy():
    # A petaflop at a teraflop a second takes 1,000 s; 360 W of it, a tenth of a kilowatt-hour.
    assert energy(1e15, 1e12, 360) == pytest.approx(0.1)
    assert energy(1e15, 1e12, 360, overhead=1.1) == pytest.approx(0.11)
    with pytest.raises(ValueError, match="above 0"):
        energy(1e15, 0, 360)
