"""Eight faked CPU devices for all tests, chosen before JAX starts."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling; the numbers do not depend on how well it is done.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# What one process compiled, its workers, its children and its later tests need not compile again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache = tempfile.mkdtemp(prefix="disco_jax_tests_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "disco", deadline=None, max_examples=6, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("disco")


@pytest.fixture
def x64():
    """Double precision within one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """A module's compiled programs are of no use to the next."""
    yield
    jax.clear_caches()
