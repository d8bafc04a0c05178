"""Rules for the whole package: who may import what, what messages may say, how often files are opened."""

import ast
import json
import re
import subprocess
import sys
import tomllib

from helpers import ROOT, TINY, make_hf

PACKAGE = ROOT / 'yolos_jax'
FILES = sorted(PACKAGE.rglob('*.py'))
# who may import whom: a file imports from its own floor and those before
FLOORS = [
    {
        'errors',
        'files',
        'file_names',
        'naming',
        'patches',
        'cpus',
        'bucket',
        'forks',
        'numba_cache',
        'lazy',
        'kernels',
        'progress_bar',
    },
    {
        'data',
        'spmd',
        'attention',
        'posembed',
        'rope',
        'boxes',
        'matcher',
        'losses',
        'optim',
        'ops',
        'model',
        'block',
        'vit',
        'classifier',
        'classification',
        'mixing',
        'steps',
    },
    {'weights'},
    {
        'analysis',
        'class_matching',
        'detections',
        'evaluation',
        'inference',
        'pictures',
        'prepared',
        'visualize',
    },
    {'run'},
    {'tools', '__main__'},
]
# the command-line modules of `run`, which every command uses, stand on the ground
GROUND = {'yolos_jax.run.cli', 'yolos_jax.run.config_files', 'yolos_jax.configs'}


def module(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imports(path):
    """The modules of this package that a file imports."""
    known = {module(p) for p in FILES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('yolos_jax'):
            for alias in node.names:
                name = f'{node.module}.{alias.name}'
                yield name if name in known else node.module


def floor(name):
    if name in GROUND:
        return 0
    inside = name.partition('.')[2].split('.')[0]  # of the package itself nothing
    return next((i for i, names in enumerate(FLOORS) if inside in names), None if inside else 0)


def test_imports_run_downward_only():
    wrong = [
        f'{module(path)} imports {name}'
        for path in FILES
        if path != PACKAGE / '__init__.py'
        for name in imports(path)
        if floor(name) is None or floor(name) > floor(module(path))
    ]
    assert not wrong


def test_there_are_no_import_circles():
    graph = {module(p): set(imports(p)) for p in FILES if p.name != '__init__.py'}
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']['packages']
    assert sorted(listed) == sorted(
        [*(module(p) for p in PACKAGE.rglob('__init__.py')), 'yolos_jax.configs']
    )


def test_flax_is_imported_by_the_models_alone_and_data_needs_no_jax():
    flax = [path.name for path in FILES if re.search(r'^\s*(import|from) flax', path.read_text(), re.M)]
    assert flax == ['block.py', 'classifier.py', 'model.py', 'vit.py']
    script = 'import sys\nfrom yolos_jax.data import batches\nassert not {"jax", "flax"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', script], check=True, cwd=ROOT)


def test_submodules_are_available_after_importing_the_package_and_scripts_load_no_torch():
    script = 'import sys, yolos_jax as y\n'
    script += 'y.model.Vit, y.data.geometry.resize_shape, y.tools.speed.macs, y.tools.attention.maps\n'
    script += 'assert not hasattr(y.tools, "nothing")\n'
    script += 'from yolos_jax.tools import convert, evaluate, predict, train\n'
    script += 'assert not {"torch", "tensorflow", "tensorflow_datasets", "transformers"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', script], check=True, cwd=ROOT)


def test_the_package_leaves_the_imports_of_other_threads_alone():
    """As a replaced `__import__` would not, not even for the time of its own import."""
    script = (
        'import builtins\n'
        'class Watched(type(builtins)):\n'
        '    def __setattr__(self, name, _):\n        raise SystemExit(f"{name} is set")\n'
        'builtins.__class__ = Watched\n'
        'import yolos_jax\n'
        'assert all(hasattr(yolos_jax, name) and name in dir(yolos_jax) for name in yolos_jax.__all__)\n'
        'assert not hasattr(yolos_jax, "nothing")'
    )
    subprocess.run([sys.executable, '-c', script], check=True, cwd=ROOT)


def messages(path):
    """The texts that a file raises or prints."""
    for node in ast.walk(ast.parse(path.read_text())):
        prints = isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print'
        if isinstance(node, ast.Raise) or prints:
            texts = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
            yield from (text for text in texts if isinstance(text, str))


def test_messages_of_the_library_name_no_flag_and_no_config():
    """Scripts add those: a notebook has neither."""
    for path in FILES:
        if path.name != 'cli.py' and path.parent.name != 'tools':
            for text in messages(path):
                assert not re.search(r'--[a-z]|\bconfig\.(?!json)[a-z]', text), f'{path}: {text}'


COUNT_OPENS = """
import contextlib, json, runpy, sys
path, commands = sys.argv[1], json.loads(sys.argv[2])
opened = []
sys.addaudithook(lambda event, args: event == 'open' and str(args[0]) == path and opened.append(1))
for sys.argv in commands:
    opened.clear()
    with contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name='__main__')
    print(sys.argv[0], 'opened', len(opened), flush=True)
"""


def test_a_script_opens_its_file_of_weights_once(coco_folder, tmp_path):
    hf = make_hf(dict(TINY, depth=2), num_classes=4)
    hf.config.id2label = {0: 'N/A', 1: 'circle', 2: 'square', 3: 'triangle'}
    hf.save_pretrained(tmp_path / 'hf')
    size = {'size': {'shortest_edge': 64, 'longest_edge': 96}}
    (tmp_path / 'hf' / 'preprocessor_config.json').write_text(json.dumps(size))
    data, alone = coco_folder, '--num_processes=1'  # JAX has begun in the script before
    commands = [
        ['convert_torch_weights.py', f'--input={tmp_path}/hf', f'--output={tmp_path}/out'],
        ['eval.py', f'--weights={tmp_path}/hf', f'--data={data}', f'--output={tmp_path}/eval', alone],
        [
            'train.py', '--config=configs/finetune.py', f'--workdir={tmp_path}/run',
            f'--config.data={data}', f'--config.init_from={tmp_path}/hf', '--config.batch_size=24',
            '--config.epochs=0', '--config.augment.sizes=(64,)', '--config.augment.max_size=96',
            '--config.eval_size=64', '--config.eval_max_size=96', '--config.num_lengths=1', alone,
        ],
    ]  # fmt: skip
    file = tmp_path / 'hf' / 'model.safetensors'
    command = [sys.executable, '-c', COUNT_OPENS, file, json.dumps(commands)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for name, *_ in commands:
        assert f'{name} opened 1\n' in done.stdout, done.stderr
