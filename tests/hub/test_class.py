"""A class: eight students at once, each runs a lab; one student's server dies in the middle."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from lablib.hub.client import Student

pytestmark = pytest.mark.hub
LABS = {
    "hedy": "00-start-here",
    "tony": "02-theory/201-markov-chains",
    "barbara": "03-experts/302-switch-transformers",
    "edsger": "04-scaling/405-batch-size-law",
    "emmy": "07-peft/706-layernorm-tuning",
    "grace": "08-compression/806-finequant",
    "kurt": "10-embeddings/1007-mmteb",
    "sofia": "04-scaling/407-step-law",
}
UNLUCKY = "sofia"


class Desk:
    """What one student of the class does, and what was saved last."""

    def __init__(self, hub, name):
        self.hub, self.name, self.path = hub, name, f"labs/{LABS[name]}.ipynb"
        self.saved, self.lives, self.orphans = None, [], []
        self.student = Student(hub.url, name, hub.password)

    def work(self):
        """From starting the server to the saved notebook; the seconds it took."""
        start = time.monotonic()
        self.student.start()
        self.student.pull(self.hub.labs)
        book = self.student.read(self.path)
        book.cells.append(new_code_cell(f"print('work of {self.name}')", id="own"))
        self.save(book)
        try:
            self.run(book)
        except ConnectionError:
            self.student.start()
            book = self.student.read(self.path)
            assert shown(book) == self.saved, "what was saved is there after the restart"
            self.run(book)
        return time.monotonic() - start

    def run(self, book):
        self.lives.append(self.hub.server(self.name).pid)
        self.student.run(self.path, book, lambda cells: self.between(book, cells))
        self.save(book)

    def between(self, book, cells):
        """After each cell: save now and then; the unlucky one's server is killed once."""
        if cells % 4 == 0:
            self.save(book)
        half = sum(cell.cell_type == "code" for cell in book.cells) // 2
        if self.name == UNLUCKY and cells == half and len(self.lives) == 1:
            self.orphans = self.hub.server(self.name).children(recursive=True)
            os.kill(self.lives[0], signal.SIGKILL)

    def save(self, book):
        self.student.save(self.path, book)
        self.saved = shown(book)


def shown(book):
    """What a notebook says: sources and texts that were put out."""
    texts = [[o.get("text") or o.get("data") for o in c.get("outputs", [])] for c in book.cells]
    return [(cell.source, text) for cell, text in zip(book.cells, texts)]


def test_a_class_of_eight_finishes_and_loses_nothing(running, capsys):
    start = time.monotonic()
    with ThreadPoolExecutor(len(LABS)) as pool:
        desks = list(pool.map(lambda name: Desk(running, name), LABS))
        seconds = list(pool.map(Desk.work, desks))
    whole = time.monotonic() - start
    for desk in desks:
        path = running.state / "users" / desk.name / desk.path
        book = nbformat.read(path, as_version=4)
        assert shown(book) == desk.saved == shown(desk.student.read(desk.path))
        assert book.cells[-1].outputs[0].text == f"work of {desk.name}\n"
        code = [cell for cell in book.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert len(desk.lives) == len(set(desk.lives)) == (2 if desk.name == UNLUCKY else 1)
        assert bool(desk.orphans) == (desk.name == UNLUCKY)
        assert [p for p in desk.orphans if p.is_running()] == [], "kernels went with their server"
    with capsys.disabled():
        print(f"\n{len(desks)} students on {os.cpu_count()} cores: {whole:.0f} s")
        for desk, took in zip(desks, seconds):
            print(f"{desk.name:8} {took:6.1f} s  {desk.path}")
    for desk in desks:
        desk.student.stop()
