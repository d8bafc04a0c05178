import os

import jax
import pytest
from helpers import ROOT

jax.config.update('jax_num_cpu_devices', 8)  # before any device is used
# programs are compiled once, in whichever worker and run needs them first; `make clean` empties the folder
COMPILED = ROOT / '.cache' / 'compiled'
os.environ |= {
    'JAX_COMPILATION_CACHE_DIR': str(COMPILED),  # of the processes that tests start
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
}
jax.config.update('jax_compilation_cache_dir', str(COMPILED))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@pytest.fixture(scope='session')
def coco_folder(tmp_path_factory):
    """A COCO folder of real JPEG files: 24 images to train on, 10 to evaluate on."""
    from yolos_jax.tools import make_shapes

    root = tmp_path_factory.mktemp('data') / 'shapes'
    make_shapes.write(root, {'train2017': 24, 'val2017': 10})
    return root
