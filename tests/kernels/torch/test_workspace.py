"""The memory that training on a CPU keeps from step to step."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
from bdh.kernels.torch.workspace import retain_freed_memory
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    for held in [[torch.ones(1 << 20) for _ in range(24)]]:
        del held

retain_freed_memory()
for _ in range(4):
    step()
before = faults()
step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets options of glibc")
def test_a_step_gets_no_new_pages_for_what_the_step_before_has_freed() -> None:
    """96 MB are 24,576 pages, and of these one of the 24 tensors may lie where none was before."""
    found = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 24_576 // 4
