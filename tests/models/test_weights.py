from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lablib.data import DataError
from lablib.files import opened
from lablib.models import GPT, GPTConfig, pretrained, pretrained_path, to_hf
from lablib.models.gguf_file import _weight
from lablib.models.weights import PACKAGED, is_ready, own_names

NAME = "smollm2-135m-instruct"
needs_smollm2 = pytest.mark.skipif(not is_ready(NAME), reason="run python -m lablib setup")
needs_minilm = pytest.mark.skipif(not is_ready("minilm-l6-v2"), reason="run python -m lablib setup")


@needs_smollm2
def test_smollm2_answers_and_equals_transformers():
    from transformers import AutoModelForCausalLM

    model, tokenizer = pretrained(NAME)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    text = model.generate(prompt, 16, greedy=True, eos=tokenizer.eos_token_id)
    assert "Paris" in tokenizer.decode(text[len(prompt) :])

    theirs = AutoModelForCausalLM.from_pretrained(pretrained_path(NAME), dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(text[None]).logits
        torch.testing.assert_close(model(text[None]), expected, atol=1e-4, rtol=1e-4)


@needs_smollm2
def test_smollm2_tokenizer_keeps_text_and_splits_digits():
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_path(NAME))
    text = "In 2023, I’ve\n\n 12 apples; don't naïve 漢字"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2023")] == ["2", "0", "2", "3"]
    assert tokenizer.encode("<|im_end|>") == [2]


@needs_minilm
def test_minilm_resolves_to_a_folder_but_is_no_language_model():
    assert (pretrained_path("minilm-l6-v2") / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="'bert' is not of the Llama family"):
        pretrained("minilm-l6-v2")


@pytest.mark.parametrize("name", own_names())
def test_our_checkpoints_reach_what_their_log_says(name):
    model, tokenizer = pretrained(name)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("And God said")) == "And God said"
    text = model.generate(tokenizer.encode("And God said"), 5, greedy=True)
    assert len(tokenizer.decode(text)) > len("And God said")


@pytest.mark.parametrize("name", own_names()[:1])
def test_a_marker_in_a_text_is_text(name):
    _, tokenizer = pretrained(name)
    ids = tokenizer.encode("one<|endoftext|> two")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "one<|endoftext|> two"


def _cut(file):
    file.write_bytes(file.read_bytes()[:-2])


def _garble(file):
    file.write_bytes(b"\xff" * file.stat().st_size)


@pytest.mark.parametrize("spoil", [_cut, _garble])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_spoiled_model_is_told_and_made_again(name, spoil, tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))

    def convert(archive, folder):
        to_hf(GPT(GPTConfig(50, 32, 1)), folder)
        (folder / "tokenizer.json").write_text('{"model": {}}')

    monkeypatch.setitem(PACKAGED, NAME, replace(PACKAGED[NAME], convert=convert))
    monkeypatch.setattr("lablib.models.weights.fetch", lambda *_, **__: None)
    folder = pretrained_path(NAME)
    assert is_ready(NAME)
    spoil(folder / name)
    assert not is_ready(NAME)
    with pytest.warns(UserWarning, match=f"{NAME} is cut or changed: it is made again"):
        pretrained_path(NAME)
    assert is_ready(NAME)


@pytest.mark.parametrize(
    ("name", "message"),
    [("rope_freqs.weight", "rope_freqs.weight has no place"), ("blk.0.attn_q.bias", "attn_q.bias")],
)
def test_a_gguf_tensor_without_a_place_is_named(name, message):
    tensor = SimpleNamespace(name=name, data=None, tensor_type=None)
    with pytest.raises(ValueError, match=message):
        _weight(tensor, {})


def test_unknown_names_get_the_nearest(monkeypatch):
    with pytest.raises(DataError, match="did you mean smollm2-135m-instruct"):
        pretrained_path("smollm-135m")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="can't be had from the Hugging Face hub"):
        pretrained_path("nobody/nothing")


@pytest.mark.parametrize("name", own_names()[:1])
def test_what_was_opened_is_recorded(name):
    opened.pop(f"model {name}", None)
    folder = pretrained_path(name)
    assert opened[f"model {name}"] == folder / "model.safetensors"
