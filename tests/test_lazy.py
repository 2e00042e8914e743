import importlib

import pytest


@pytest.mark.parametrize("name", ["lab", "data", "models", "training", "evidence"])
def test_completion_knows_the_names_that_are_loaded_late(name):
    package = importlib.import_module(f"lablib.{name}")
    assert set(package.__all__) <= set(dir(package)) and "__name__" in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        getattr(package, "nonsense")  # noqa: B009
