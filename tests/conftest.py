"""Eight CPU devices, strict ranks and types, and checks of key reuse."""

import gc
import os
from pathlib import Path

import hypothesis
import jax
import pytest

from rlhfjax.host.memory import collect_seldom
from rlhfjax.xla_flags import refused

# Most of a run is compiling programs that then run once; the first two take two thirds of that time away, and programs
# as small as these cost a quarter less whole than in 32 parts for 32 cores.
FASTER_COMPILER = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",  # up to jax 0.11.1
    "--xla_cpu_parallel_codegen_split_count=1",
)
# With the scheduler that is the default, programs on several CPU devices may start their collectives in different
# orders and wait for each other until XLA gives up and ends the process.
IN_ORDER = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"

# Elsewhere whole stages run, with Adam of optax in them, which raises a float to an integer power.
STRICT_TYPES = {"algorithms", "generation", "models", "sharding", "training", "test_api.py", "test_rules.py"}


def pytest_configure(config):
    collect_seldom()  # from the start: imports are a fifth quicker
    use_flags(*FASTER_COMPILER, IN_ORDER)
    jax.config.update("jax_platforms", os.environ.get("RLHFJAX_TEST_PLATFORM", "cpu"))  # cuda: tests of kernels alone
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_debug_key_reuse", True)
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir  # of processes that tests start, too
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Another run of the tests may be writing the entry.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache:UserWarning")
    # How long an example takes says nothing about the code on a busy machine.
    hypothesis.settings.register_profile("no deadline", deadline=None)
    hypothesis.settings.load_profile("no deadline")


def use_flags(*flags):
    """Before jax starts its devices; XLA would end the process, and each worker, for one that it does not know."""
    unknown = refused(flags)
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in flags if flag not in unknown), given]).strip()


def pytest_collection_modifyitems(items):
    """Whole stages first, whose files take longest: no worker is left with one of them at the end."""
    items.sort(key=lambda item: not {"stages", "sharding"} & set(item.path.parts))


def pytest_collection_finish():
    """What is imported stays, and is looked through for cycles no more; traces, seldom: a tenth of a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_collector():
    """A test may tell Python when to look for cycles; the tests after it look when all do."""
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)


@pytest.fixture(autouse=True, scope="module")
def strict_types(request):
    """No silent widening of types."""
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    with jax.numpy_dtype_promotion("strict" if folder in STRICT_TYPES else "standard"):
        yield
