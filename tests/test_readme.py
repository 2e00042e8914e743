"""What the README tells its reader to type must exist."""

import re
import subprocess
import sys

import pytest

from lablib import cli
from lablib.lab.open import command
from lablib.papers import tomllib
from lablib.paths import notebooks, project_dir

ROOT = project_dir()
README = (ROOT / "README.md").read_text("utf-8")
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_every_make_target_named_is_there():
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert {"lab", "test"} <= named
    assert named <= set(TARGETS)


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"python -m lablib ([a-z][^`\n|]*)", README)))
)
def test_every_command_named_parses(line):
    words = [re.sub("SLUG|LAB", "101", word) for word in re.sub(r"[\[\]]|#.*", "", line).split()]
    assert cli._parser().parse_args(words).run


def test_addresses_come_from_one_place():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    owner = address["Repository"].removeprefix("https://github.com/")
    texts = [README, *(path.read_text("utf-8") for path in notebooks())]
    for text in texts:
        for kind in (r"/github/([\w.-]+/[\w.-]+)/blob", r"/v2/gh/([\w.-]+/[\w.-]+)/main"):
            assert set(re.findall(kind, text)) <= {owner}
    assert f"colab.research.google.com/github/{owner}/" in README
    assert f"mybinder.org/v2/gh/{owner}/main" in README


def test_pictures_and_links_into_the_project_are_there():
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_jupyter_is_on_loopback_with_its_token_on():
    line = command()
    assert line[0] == sys.executable and "--ip=127.0.0.1" in line
    assert not any("token" in word.lower() for word in line), (
        "the token is left as Jupyter makes it"
    )


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_examples_run(block, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_the_moe_example_adds_what_its_routers_left():
    (block,) = (
        text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "MoE(" in text
    )
    scope = {}
    exec(block, scope)
    router = scope["model"].blocks[0].mlp.router
    assert scope["balance"].item() > 0
    with_balance = router.weight.grad.clone()
    scope["model"].zero_grad()
    hidden = scope["model"].hidden_states(scope["tokens"][:, :-1])
    weight, targets = scope["model"].head.weight, scope["tokens"][:, 1:]
    scope["linear_cross_entropy"](hidden, weight, targets).backward()
    assert not with_balance.allclose(router.weight.grad), "the balancing loss had no effect"
