"""Eight virtual CPU devices and a persistent compilation cache for every test process."""

import ctypes
import gc
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile thousands of tiny programs and run each a few times: compiling less well, and with the older and simpler
# emitters, takes a third less time.
os.environ["XLA_FLAGS"] = " ".join((
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true", "--xla_cpu_use_fusion_emitters=false",
))  # fmt: skip
# As many workers as cores: further threads of BLAS would wait for each other, thirty times as long as one needs for an SVD.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
LARGE = 2.5 * 2**30  # bytes; a compiled program of one operation takes 2 MB


def pytest_collection_finish():
    """What is imported by now stays: the collector, which runs often while programs are traced, need not look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def forget_programs():
    """A process that has grown large drops its programs; a small one keeps them, for the next test would compile some again."""
    global LARGE
    yield
    if "jax" in sys.modules and resident() > LARGE:
        sys.modules["jax"].clear_caches()
        gc.collect()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what is freed stays with the process otherwise
        LARGE = max(LARGE, 1.5 * resident())


def resident():
    """Bytes of memory that this process holds; where the system does not say, more than any limit."""
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return sys.maxsize
