import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
from helpers import ROOT

HELP = """
import runpy, sys
sys.path.insert(0, 'benchmarks')
for script in sys.argv[1:]:
    sys.argv = [script, '--help']
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as end:
        assert not end.code, script
"""


def test_every_benchmark_starts():
    """Everything that they import is there; what they measure takes minutes."""
    modules = sorted(ROOT.glob('benchmarks/*.py'))
    scripts = [str(path) for path in modules if 'ArgumentParser' in path.read_text()]
    done = subprocess.run([sys.executable, '-c', HELP, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode and done.stdout.count('usage: ') == len(scripts) > 10, done.stderr


def test_the_measurements_of_a_gpu_can_be_made(tmp_path):
    """At a small size, on the CPU: every row has a value and none an error."""
    command = ['bash', 'benchmarks/gpu.sh', '--small', '--minutes=60', f'--output={tmp_path}']
    environment = os.environ | {'PYTHON': sys.executable}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = {row.pop('what'): row for row in json.loads((tmp_path / 'gpu.json').read_text())['rows']}
    assert len(rows) == 11 and all(isinstance(x, float) for row in rows.values() for x in row.values()), (
        rows
    )
    assert rows['logits small, float32']['difference'] < 1e-5
    assert (tmp_path / 'gpu.md').read_text().count('\n') == 4 + len(rows)


def test_the_memory_traffic_of_a_program_is_that_of_its_arrays(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    from gpu_model import kernels

    table, x = jnp.ones((9, 500)), jnp.ones(500)

    def traffic(function, *arrays, **options):
        program = jax.jit(function, **options).lower(*arrays).compile()
        return sum(cost for cost, _, _ in kernels(program.as_text()))

    assert traffic(lambda x: jnp.sin(x) * 2 + x, x) == 2 * x.nbytes
    assert traffic(lambda table, x: table[3] * x + 1, table, x) == 3 * x.nbytes
    # in place, the row that is written
    assert traffic(lambda table, x: table.at[2].set(x * 2), table, x, donate_argnums=0) == 2 * x.nbytes
