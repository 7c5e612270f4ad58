"""What every test shares, and how much Hypothesis does.

In the suite it tries a bounded number of examples, the same ones in every run, and never minds how long they take; with
``HYPOTHESIS_PROFILE=long`` it tries thousands of new ones:

    HYPOTHESIS_PROFILE=long python -m pytest tests/stateful
"""

import os

import pytest
from hypothesis import HealthCheck, settings

_COMMON = settings(
    deadline=None,  # An example may open databases; what it takes is the disk's affair, and the machine's.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    stateful_step_count=30,
    print_blob=True,
)
settings.register_profile("suite", _COMMON, max_examples=50, derandomize=True, database=None)
settings.register_profile("long", _COMMON, max_examples=3000)
# Not by the plugin's option: then Hypothesis would choose a profile of its own where it finds itself in CI.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
