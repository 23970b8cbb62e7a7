"""The tests of test_graph_faults.py on a tiny model of each family: a file of their own, so that two processes share
them out and each model is built once."""

from __future__ import annotations

import pytest

from tests.verify.test_graph_faults import (  # noqa: F401 - collected here
    pytest_generate_tests,
    subjects,
    test_a_fault_in_the_calls_is_caught,
    test_a_fault_in_the_graph_is_caught,
    test_a_right_graph_passes_all_gates,
)

pytestmark = [pytest.mark.slow, pytest.mark.torch]
BUNDLED = False
