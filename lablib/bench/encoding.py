"""`python -m lablib bench encoding`: vectors of texts with MiniLM, beside sentence-transformers."""

import importlib.util
import json
import random
import statistics
from collections.abc import Callable

from lablib.data.corpora import load
from lablib.embeddings.encode import Encoder
from lablib.files import write_json
from lablib.models.classifier import encoder
from lablib.models.weights import pretrained_path
from lablib.paths import data_dir
from lablib.resources import measure

MEASURED = data_dir() / "measured" / "encoding.json"
PEER = "sentence-transformers"


def mixed_texts(n: int, seed: int = 0) -> list[str]:
    """n passages of the King James Bible, from 3 to 120 words, short ones as often as long ones."""
    draw = random.Random(seed)
    words = " ".join(text for _, text in load("bible")).split()
    starts = [draw.randrange(len(words) - 120) for _ in range(n)]
    return [" ".join(words[start : start + draw.randint(3, 120)]) for start in starts]


def bench_encoding(n: int = 2000, repeats: int = 3) -> dict[str, float]:
    """Encode n texts of mixed length with each in turn; the median texts a second of each.

    Rounds are paired: in each both encode all texts, one after the other, so that a busy machine
    slows both. A printed ratio is the median over rounds of our seconds to sentence-transformers',
    where that package is installed. Both read 256 tokens a text and give vectors of length 1, with
    as many threads as torch has.
    """
    return {way: n / statistics.median(times) for way, times in timed(n, repeats).items()}


def store(n: int = 2000, repeats: int = 3) -> None:
    """Measure, and write the ratio of each round to data/measured/encoding.json.

    Speeds stay out of the file: they are the machine's, the ratio is not. Nothing is written where
    sentence-transformers is not installed.
    """
    times = timed(n, repeats)
    if PEER in times:
        rounds = [round(own / peer, 3) for own, peer in zip(times["Encoder"], times[PEER])]
        write_json(MEASURED, {"texts": n, "seconds to the peer's, by round": rounds})


def stored() -> dict:
    """What was measured: "texts", and "seconds to the peer's, by round"."""
    return json.loads(MEASURED.read_text("utf-8"))


def timed(n: int, repeats: int) -> dict[str, list[float]]:
    """Way -> seconds of each round; prints a line for each way."""
    texts = mixed_texts(n)
    ways: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(str(pretrained_path("minilm-l6-v2")), device="cpu")
        peer.max_seq_length = 256
        ways[PEER] = lambda: peer.encode(texts, normalize_embeddings=True)
    ours = Encoder(*encoder("minilm-l6-v2"), max_length=256)
    ways["Encoder"] = lambda: ours(texts)
    times = measure(ways, repeats)
    first = next(iter(times))
    for way, seconds in times.items():
        ratio = statistics.median(own / peer for own, peer in zip(seconds, times[first]))
        print(
            f"MiniLM {way:24} {n / statistics.median(seconds):7.1f} texts a second, {ratio:5.2f} x"
        )
    return times
