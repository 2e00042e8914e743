import pytest
import torch
from torch import nn

from lablib.compression.recover import language_loss, recover
from lablib.models import GPT, GPTConfig, anatomy
from lablib.peft import cost_table
from lablib.peft import measure as m
from lablib.peft.adapter import adapters, trainable
from lablib.peft.lora import lora_
from lablib.peft.qlora import nf4_, qlora_

ROWS = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    return GPT(GPTConfig(50, 32, 2, 4, 2, init_std=0.2))


def loss(model):
    return language_loss(model, ROWS)


def outputs(model):
    return anatomy.logits(model, ROWS)


def test_an_account_by_hand():
    """One layer on frozen input: its input is saved for the weight, and a square's argument."""
    layer, x = nn.Linear(8, 3, bias=False), torch.randn(5, 8)
    made = m.account(layer, lambda model: model(x).square().sum())
    expected = {"parameters": 96, "gradients": 96, "optimizer": 192, "saved": 5 * 8 * 4 + 5 * 3 * 4}
    assert made == expected | {"total": sum(expected.values())}


def test_a_tensor_saved_twice_counts_once():
    w = nn.Parameter(torch.randn(6))
    holder = nn.Module()
    holder.w = w
    x = torch.randn(6)
    assert (
        m.account(holder, lambda model: (model.w * x + model.w * x.view(2, 3).view(6)).sum())[
            "saved"
        ]
        == 24
    )


def test_a_bill_in_words_is_the_account():
    model = build()
    lora_(model, rank=2)
    model.requires_grad_(True)  # as training by name leaves it
    told = m.bill(model, loss)
    assert all(parameter.requires_grad for parameter in model.parameters())
    n, whole = (
        sum(p.numel() for p in trainable(model).values()),
        sum(p.numel() for p in model.parameters()),
    )
    row = m.measure_method(build(), lambda one: lora_(one, rank=2), loss)
    assert told.startswith(f"{n:,} numbers train, {n / whole:.2%} of all;")
    assert f"{(row['total'] - row['parameters']) / 1e6:,.1f} MB beside" in told
    assert f"{row['parameters'] / 1e6:,.1f} MB of weights" in told


def test_a_bill_of_named_parameters():
    model = build()
    names = [name for name, _ in anatomy.norms(model).items()]
    weights = {name for name, _ in model.named_parameters()}
    chosen = [f"{name}.weight" for name in names]
    assert set(chosen) <= weights
    told = m.bill(model, loss, chosen)
    assert told.startswith(f"{5 * 32} numbers train")
    assert m.bill(model, loss, weights).startswith(f"{model.n_parameters():,} numbers train, 100")


def test_lora_saves_gradients_and_optimizer_but_few_activations():
    model = build()
    rows = {
        name: m.measure_method(model, method, loss, outputs)
        for name, method in {"full": m.full, "lora": lambda model: lora_(model, rank=2)}.items()
    }
    full, lora = rows["full"], rows["lora"]
    assert full["n_trainable"] == model.n_parameters() and full["share"] == 1
    assert lora["gradients"] == 4 * lora["n_trainable"] < full["gradients"] / 4
    assert lora["optimizer"] == 2 * lora["gradients"]
    assert lora["parameters"] == full["parameters"] + 4 * lora["n_trainable"]
    assert lora["total"] < full["total"]
    assert lora["merge_error"] < 1e-5 and full["merge_error"] is None
    assert 4 * lora["n_trainable"] < lora["file_bytes"] < 4 * lora["n_trainable"] + 4000


def test_the_model_is_given_back_as_it_was():
    model = build()
    model.embedding.weight.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    m.measure_method(model, lora_, loss, outputs)
    m.times(model, {"full": m.full, "lora": lora_}, loss, outputs, repeats=1)
    after = dict(model.named_parameters())
    assert not adapters(model) and list(after) == list(before)
    for name, (bits, asks) in before.items():
        assert torch.equal(after[name], bits) and after[name].requires_grad == asks
        assert after[name].grad is None


def test_an_account_is_the_same_twice_and_grows_with_the_text():
    model = build()
    first, again = m.account(model, loss), m.account(model, loss)
    longer = m.account(model, lambda model: language_loss(model, ROWS.repeat(2, 1)))
    assert first == again and longer["saved"] > 1.9 * first["saved"]


def test_times_are_of_every_method_and_positive():
    made = m.times(build(), {"full": m.full, "lora": lora_}, loss, outputs, repeats=2)
    assert set(made) == {"full", "lora"}
    assert all(v > 0 for row in made.values() for v in row.values())


def test_a_failing_loss_leaves_no_adapter():
    model = build()

    def fails(model):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        m.measure_method(model, lora_, fails)
    assert not adapters(model)


def learn(model):
    recover(model, ROWS, 3, 0.05, trainable=list(trainable(model)) or "all")


def judge(model):
    return loss(model).item()


WAYS = {"lora": lambda model: lora_(model, rank=2), "full": m.full}


def test_rows_of_several_methods_tell_of_time_memory_and_what_was_learned():
    model = build()
    bits = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = judge(model)
    rows = m.measure_methods(model, WAYS, loss, outputs, learn=learn, judge=judge, repeats=1)
    for row in rows.values():
        assert row["held_out"] < start - 0.1 and min(row["step"], row["inference"]) > 0
        assert row["rise_bytes"] is None or row["rise_bytes"] >= 0
    assert 0 < rows["lora"]["merge_error"] < 1e-5  # of what has learned, so not of zeros
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())
    assert judge(model) == start


def test_what_was_not_asked_for_is_none():
    row = m.measure_method(build(), lora_, loss)
    assert [row[key] for key in ("rise_bytes", "held_out", "merge_error")] == [None] * 3


def test_what_refuses_to_be_merged_has_no_error_of_merging():
    model = build()
    nf4_(model)
    row = m.measure_method(model, lambda model: qlora_(model, rank=2), loss, outputs)
    assert row["merge_error"] is None and not adapters(model)


def test_a_rise_of_memory_is_seen():
    rose = m.rise(lambda: torch.ones(30_000_000).sum())
    assert rose is None or 100e6 < rose < 200e6
    with pytest.raises(ZeroDivisionError):
        m.rise(lambda: 1 / 0)


def test_a_table_has_a_text_for_each_number_and_a_blank_where_there_is_none():
    model = build()
    rows = {name: m.measure_method(model, way, loss, outputs) for name, way in WAYS.items()}
    rows["lora"] |= {"step": 0.5, "inference": 0.2}
    rows["full"] |= {"step": 1.0, "inference": 0.1}
    told = cost_table.cells(rows)
    assert told["numbers<br>that<br>train"] == [f"{rows[name]['n_trainable']:,}" for name in rows]
    assert told["step<br>takes"] == ["1.00", "2.00"]
    assert told["inference<br>takes"] == ["1.00", "0.50"]
    assert told["off<br>when<br>merged"][1] == cost_table.BLANK
    assert "held<br>out,<br>nats" not in told and "measured<br>rise,<br>MB" not in told
    account = rows["full"]
    beside = (account["total"] - account["parameters"]) / 1e6
    assert told["beside<br>weights,<br>MB"][1] == f"{beside:,.1f}"


def test_the_dearest_of_a_column_is_the_darkest():
    pytest.importorskip("plotly")
    from plotly.graph_objects import Figure

    model = build()
    rows = {name: m.measure_method(model, way, loss) for name, way in WAYS.items()}
    (made,) = cost_table.drawn(Figure(), rows).data
    assert list(made.y) == ["lora", "full"] and [row[0] for row in made.z][1] == 1.0
    assert 0 < made.z[0][0] < 0.5 and made.text[1][0] == f"{rows['full']['n_trainable']:,}"
