import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPTS = [x.stem for x in sorted((ROOT / 'benchmarks').glob('*.py')) if 'ArgumentParser' in x.read_text()]


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_benchmark_starts(name):
    """Everything it imports is there; what it measures takes minutes."""
    command = [sys.executable, f'benchmarks/{name}.py', '--help']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'usage' in done.stdout, done.stderr


def test_the_measurements_of_a_gpu_can_be_made(tmp_path):
    """At a small size, on the CPU: every row has a value and none an error."""
    command = ['bash', 'benchmarks/gpu.sh', '--small', f'--output={tmp_path}']
    environment = os.environ | {'PYTHON': sys.executable}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = {row.pop('what'): row for row in json.loads((tmp_path / 'gpu.json').read_text())['rows']}
    assert len(rows) == 11 and all(isinstance(x, float) for row in rows.values() for x in row.values()), (
        rows
    )
    assert rows['logits small, float32']['difference'] < 1e-5
    assert (tmp_path / 'gpu.md').read_text().count('\n') == 4 + len(rows)
