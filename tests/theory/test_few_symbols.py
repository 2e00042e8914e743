import pytest

from lablib.theory.few_symbols import ALPHABETS, parity_text, spell, symbolize


def test_text_in_few_symbols():
    assert symbolize("To be, 2 B\n", 2).tolist() == [1, 0, 1, 0, 1]
    assert symbolize("A  b.", 4).tolist() == [0, 2, 1, 3]
    assert spell(symbolize("A  b.", 4), 4) == "V_C."
    with pytest.raises(ValueError, match="no alphabet has 5 symbols"):
        symbolize("text", 5)


@pytest.mark.parametrize("size", ALPHABETS)
def test_each_character_is_in_one_group(size):
    characters = "".join(ALPHABETS[size].values())
    assert len(ALPHABETS[size]) == size and len(characters) == len(set(characters))


def test_each_bit_is_the_parity_of_three():
    bits = parity_text(40, (1, 1, 0)).tolist()
    assert bits[:7] == [1, 1, 0, 0, 1, 1, 0]
    assert all(bits[n] == (bits[n - 3] + bits[n - 2] + bits[n - 1]) % 2 for n in range(3, 40))
    assert parity_text(5, (1, 1, 1)).tolist() == [1] * 5
