import collections
import gc
import os
import shutil

import jax
import pytest
import storage
from helpers import CLASSES, ROOT, TINY

jax.config.update('jax_num_cpu_devices', 8)  # before any device is used
# programs are compiled once, in whichever worker and run needs them first; `make clean` empties the folder
COMPILED = ROOT / '.cache' / 'compiled'
os.environ |= {
    # processes on a busy machine wait for one another, and XLA aborts those that waited for 40 s; without
    # LLVM's optimisations, of programs that run for a second, compiling takes two thirds of the time
    'XLA_FLAGS': '--xla_cpu_collective_call_terminate_timeout_seconds=1000 '
    '--xla_cpu_collective_timeout_seconds=1000 --xla_backend_optimization_level=0',
    'JAX_COMPILATION_CACHE_DIR': str(COMPILED),  # of the processes that tests start
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',  # many small ones take as long as a large one
}
jax.config.update('jax_compilation_cache_dir', str(COMPILED))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


@pytest.fixture(scope='module', autouse=True)
def few_programs():
    """Compiled programs of a module do not stay in memory; they come back from the disk where needed."""
    yield
    jax.clear_caches()


@pytest.fixture(scope='session')
def coco_folder(tmp_path_factory):
    """A COCO folder of real JPEG files: 24 images to train on, 10 to evaluate on."""
    from yolos_jax.tools import make_shapes

    root = tmp_path_factory.mktemp('data') / 'shapes'
    make_shapes.write(root, {'train2017': 24, 'val2017': 10})
    return root


@pytest.fixture(scope='session')
def class_folder(tmp_path_factory):
    """Twenty classes: 60 images to train on, 40 to evaluate on."""
    from yolos_jax.tools import make_classes

    root = tmp_path_factory.mktemp('classes') / 'forms'
    make_classes.write(root, {'train': 3, 'val': 2})
    return root


@pytest.fixture(scope='session')
def saved(tmp_path_factory):
    """The folder of a small detector of three classes with random weights."""
    from yolos_jax import weights
    from yolos_jax.model import Yolos, init_params
    from yolos_jax.weights import checkpoint

    yolos, folder = Yolos(**TINY, num_classes=4), tmp_path_factory.mktemp('weights') / 'x'
    params = init_params(yolos, jax.random.key(0))
    checkpoint.write(weights.Pretrained(yolos, params, CLASSES, 64, 128), folder)
    return folder


@pytest.fixture(scope='module', params=storage.SERVERS)
def place(request):
    """The URL of an empty bucket behind a network that fails, cuts short and delays, and that network."""
    with (
        storage.SERVERS[request.param]() as url,
        storage.network(url) as (url, network),
        pytest.MonkeyPatch.context() as m,
    ):
        for name, value in storage.environment(url, request.param).items():
            m.setenv(name, value)
        yield f'{request.param}://{storage.BUCKET}', network


@pytest.fixture
def bad_network(place):
    """One request in ten fails, one body in ten ends early, and each takes 20 ms more."""
    _, network = place
    before = network.failed + network.shortened
    network.fail, network.cut, network.delay = 0.1, 0.1, 0.02
    yield
    network.fail = network.cut = network.delay = 0
    assert network.failed + network.shortened > before


@pytest.fixture(scope='module')
def data_url(place, coco_folder):
    """The folder of `coco_folder` in a bucket."""
    return storage.upload(coco_folder, f'{place[0]}/data')


def pytest_collection_finish():
    """Exempt what is imported from garbage collection, which took a twelfth of the CPU time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def pytest_collection_modifyitems(items):
    """Start the files that take longest first, so that no process waits for one of them at the end."""
    long = 'test_cluster', 'test_train', 'test_docs', 'test_bucket', 'test_run_options', 'test_pretraining'
    items.sort(key=lambda item: item.path.stem not in long)


def pytest_runtest_setup(item):
    """Tests that are rows of the table of trials count one each, or what their marker says."""
    if row := item.get_closest_marker('row'):
        item.user_properties.append(('row', (row.args[0], row.kwargs.get('count', 1))))


def pytest_terminal_summary(terminalreporter, config):
    """`make trials` ends with a table: how many of each kind, and how many failed."""
    if 'trials' not in (config.getoption('-m') or '').replace('not trials', ''):
        return
    rows, slowest = collections.defaultdict(lambda: [0, 0]), 0.0
    for outcome in ('passed', 'failed', 'error'):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, 'user_properties', []):
                slowest = max(slowest, value) if name == 'seconds' else slowest
                if name == 'row' and report.when == 'call':
                    rows[value[0]][outcome != 'passed'] += value[1]
    terminalreporter.section('trials')
    for name, (passed, failed) in sorted(rows.items()):
        terminalreporter.write_line(f'{name:44} {passed + failed:6} trials, {failed} failed')
    if slowest:
        terminalreporter.write_line(f'slowest answer to a signal: {slowest:.1f} s')


@pytest.fixture
def photographs(coco_folder, tmp_path):
    """Ten photographs in a folder of the user's."""
    return shutil.copytree(coco_folder / 'val2017', tmp_path / 'photographs')


@pytest.fixture(scope='session')
def coco(tmp_path_factory):
    """45 images as a COCO folder."""
    from yolos_jax.tools import make_shapes

    root = tmp_path_factory.mktemp('layouts') / 'coco'
    make_shapes.write(root, {'train2017': 30, 'val2017': 15})
    return root
