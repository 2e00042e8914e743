"""Labs as their readers meet them: opened in JupyterLab, run, and each control moved."""

import json

import pytest
from choice import chosen
from driving import ERRORS, make_guess, move_all, open_lab, run_all, shoot, shoot_all

from lablib.paths import notebooks, project_dir

ROOT = project_dir()


@pytest.mark.browser
@pytest.mark.parametrize("lab", chosen(), ids=lambda path: path.stem)
def test_a_lab_runs_and_each_control_moves_its_figure(lab, jupyter, page):
    open_lab(page, jupyter, lab.relative_to(ROOT).as_posix())
    shoot(page, f"{lab.stem}-top")
    run_all(page)
    assert page.evaluate(ERRORS) == []
    shoot_all(page, lab.stem)
    boxes = page.locator(".lablib-explore")
    assert boxes.count() >= 1, "a lab has something to explore"
    moved = [move_all(page, boxes.nth(place)) for place in range(boxes.count())]
    assert all(moved), f"controls moved in each explorer: {moved}"
    guesses = page.locator(".lablib-predict")
    for place in range(guesses.count()):
        make_guess(page, guesses.nth(place))
    page.wait_for_function("() => !document.querySelector('.lablib-show-me')", timeout=15_000)
    assert page.evaluate(ERRORS) == []
    shoot_all(page, f"{lab.stem}-moved")


def test_every_lab_that_is_there_can_be_driven():
    found = {path.name for path in notebooks()}
    known = {path.name for path in chosen({"ALL": "1"})}
    assert found == known, json.dumps(sorted(found ^ known))
