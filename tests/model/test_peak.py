"""The peak of memory that is read from the system."""

import subprocess
import sys

import pytest

CHILD = "import torch; from qdpo.model.device import peak_gib; print(peak_gib(torch.device('cpu')))"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands a parent's peak on")
def test_the_peak_of_a_run_is_not_that_of_the_program_which_started_it() -> None:
    large = b"\1" * 2**30
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert 0.1 < float(child.stdout) < len(large) / 2**30
