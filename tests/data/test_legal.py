import pytest

from lablib.data import legal
from lablib.data.tasks import with_near_copies

BODY = "in no event shall the authors owe anybody anything " * 3


@pytest.mark.parametrize(
    ("heading", "label"),
    [
        ("7. Limitation of Liability. ", 1),
        ("DISCLAIMER OF WARRANTIES\n", 0),
        ("Section 12.1: No Warranty: ", 0),
        ("(ii) Liability - ", 1),
    ],
)
def test_a_clause_is_what_its_heading_says_and_the_heading_is_cut_off(heading, label):
    found = legal.clause_of(heading + BODY)
    assert found.label == label and found.text == BODY.strip()


@pytest.mark.parametrize(
    "paragraph",
    [
        "Disclaimer of warranty and limitation of liability. " + BODY,  # both
        "Termination. " + BODY,
        "Limitation of Liability. Too short.",
        BODY,
        "",
        "the warranty of the authors: " + BODY,  # no heading: it begins within a sentence
    ],
)
def test_other_paragraphs_are_no_clause(paragraph):
    assert legal.clause_of(paragraph) is None


@pytest.mark.parametrize(
    ("task", "labels"), [(legal.clauses, legal.CLAUSES), (legal.families, legal.FAMILIES)]
)
def test_splits_hold_every_label_and_no_near_copies(task, labels):
    splits = task()
    for part in splits:
        assert {example.label for example in part} == set(range(len(labels)))
    assert len(splits.train) > len(splits.test) > len(splits.validation)
    every = [example for part in splits for example in part]
    assert len({example.source for example in with_near_copies(every)}) > 0.98 * len(every)


def test_a_family_is_its_notices_licence():
    text = next(e.text for e in legal.families().train if legal.FAMILIES[e.label] == "apache")
    assert "apache" in text.lower()
