import pytest

from tests.unit_tests.objectives.dense_reference import Models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A student and a teacher, each as run here and as transformers runs it."""
    return Models(tmp_path_factory.mktemp("models"))
