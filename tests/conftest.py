"""Fixtures: outside data, and a small model."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_nans", False)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of outside test data, or a skip."""
    folder = os.environ.get("ZO2JAX_TEST_DATA")
    if not folder:
        pytest.skip("ZO2JAX_TEST_DATA is not set: it names the folder with models/, text/ and tasks/")
    path = Path(folder)
    assert path.is_dir(), f"ZO2JAX_TEST_DATA={folder} is no folder"
    return path


@pytest.fixture(scope="session")
def stories(test_data: Path) -> Path:
    """A real pretrained Llama of 260,032 parameters."""
    return test_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def shakespeare(test_data: Path) -> Path:
    return test_data / "text" / "tinyshakespeare.txt"
