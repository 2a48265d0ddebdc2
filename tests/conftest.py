"""What every test runs under: a fixed plan, so that results have the same bits each time, and no cache of times.

Without a CUDA device Triton interprets its kernels, which has to be said before anything imports it.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["GRANET_PLAN"] = "native"
os.environ["GRANET_PLAN_CACHE"] = ""


@pytest.fixture(autouse=True)
def _native_plan() -> Iterator[None]:
    """Whatever the sessions of other tests, and of shared fixtures, have made the plan of the process."""
    from granet_kernels import plan  # not before the environment is set

    with plan.use(os.environ["GRANET_PLAN"]):
        yield
