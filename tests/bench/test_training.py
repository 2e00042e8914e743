import pytest

from lablib.bench.training import bench_lora


def test_a_step_of_lora_is_timed_beside_peft(capsys):
    pytest.importorskip("peft")
    times = bench_lora("tiny-1m", repeats=2, rank=2, length=8)
    assert list(times) == ["peft, transformers' Llama", "lora_, transformers' Llama", "lora_, GPT"]
    assert all(seconds > 0 for seconds in times.values())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "1.00 x" in printed[0]
