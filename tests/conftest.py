"""Fixtures: outside data, and a tiny model that is made here."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from families import optimization
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from zo2jax.models.hub import export
from zo2jax.models.llama import LlamaConfig

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test compiles others find, in other processes too; nothing is kept from one session to the next."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    jax.config.update("jax_compilation_cache_dir", str(shared / "compiled"))
    os.environ["ZO2JAX_CACHE"] = str(shared / "cache")  # of the machine's rates
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Linux maps 65,530 pieces of memory for a process, and each compiled program is several: beyond, XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 8_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of outside test data, or a skip."""
    folder = os.environ.get("ZO2JAX_TEST_DATA")
    if not folder:
        pytest.skip("ZO2JAX_TEST_DATA is not set: it names the folder with models/, text/ and tasks/")
    path = Path(folder)
    assert path.is_dir(), f"ZO2JAX_TEST_DATA={folder} is no folder"
    return path


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Without XLA's optimizations, compiling takes a third of the time."""
    with optimization(False):
        yield


@pytest.fixture
def optimized() -> Iterator[None]:
    """As in use, where quick compilation would leave nothing to find."""
    with optimization(True):
        yield


@pytest.fixture(scope="session")
def stories(test_data: Path) -> Path:
    """A real pretrained Llama of 260,032 parameters."""
    return test_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def shakespeare(test_data: Path) -> Path:
    return test_data / "text" / "tinyshakespeare.txt"


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """256 byte tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer) -> Path:
    """A Hugging Face folder of a random Llama of one layer on bytes."""
    config = LlamaConfig(
        vocabulary=256, size=16, hidden=24, layers=1, heads=2, kv_heads=1, head_size=8, context=64, tied=True
    )
    model = replace(config.init(jax.random.key(1)), tokenizer=byte_tokenizer)
    return export(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 10,000 characters of arithmetic in words."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    lines = [f"{a} and {b} make {names.index(a) + names.index(b)}.\n" for a in names for b in names]
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_text("".join(lines) * 4)
    return path
