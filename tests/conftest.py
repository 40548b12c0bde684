"""Where the suite runs: `gpu` tests are skipped, and counted, without a CUDA device; Triton's interpreter stands in.

With a CUDA device the tests of kernels run on it, and nothing is interpreted.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the first import of ours
    from interpreter import add_as_a_tree

    add_as_a_tree()


def pytest_addoption(parser):
    parser.addoption("--soak", metavar="FILE", help="tests/reliability at full length; its figures go to FILE")


def pytest_report_header():
    return f"Triton kernels: {'on ' + torch.cuda.get_device_name() if torch.cuda.is_available() else 'interpreted'}"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """torch.empty and its kin are filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
