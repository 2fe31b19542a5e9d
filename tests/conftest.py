"""One thread for torch: tiny models gain nothing from a second one, and DALI has the other core."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="record the seeded losses anew: results changed")
