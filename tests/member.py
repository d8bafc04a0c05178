"""Runs a script as one of several processes that keep their compiled programs.

python member.py SCRIPT ...

JAX keeps only those of the first process, because on GPUs and TPUs the others read the same ones. On CPUs a
program's key differs between processes, so the others would compile everything anew in every test.
"""

import runpy
import sys
from types import SimpleNamespace

from jax._src import compiler

compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
