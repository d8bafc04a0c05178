import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.parametrize(
    'name', ['data', 'peers', 'report', 'scaling', 'start', 'tpu_compile', 'tpu_model']
)
def test_a_benchmark_starts(name):
    """Everything it imports is there; what it measures takes minutes."""
    command = [sys.executable, f'benchmarks/{name}.py', '--help']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'usage' in done.stdout, done.stderr
