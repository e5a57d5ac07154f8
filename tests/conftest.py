"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.models import tiny_config, write_model

# Triton's kernels run in its interpreter, on CPU tensors; it asks when a kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"

# No example fails for being slow: a machine may be busy.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Tests run side by side, one a core: several threads each would only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a small random model in it."""
    directory = tmp_path_factory.mktemp("tiny")
    write_model(directory, tiny_config())
    return directory
