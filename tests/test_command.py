import argparse
import gc
import importlib
import io
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, saved_flags

from yolos_jax.errors import InputError
from yolos_jax.run import cli, config_files, workdir
from yolos_jax.tools import attention, command, flags, predict, speed, tokens, train

ENVIRONMENT = os.environ | {'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
YOLOS = [sys.executable, '-m', 'yolos_jax']


def yolos(*arguments, cwd):
    """Run the command away from the repository, as an installed one is."""
    return subprocess.run([*YOLOS, *arguments], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)


def test_the_commands_are_listed_and_another_one_is_named(tmp_path):
    done = yolos(cwd=tmp_path)
    assert done.returncode == 0 and all(f'  {name} ' in done.stdout for name in command.COMMANDS)
    done = yolos('detect', cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith('error: no command detect; there are train')


@pytest.mark.parametrize('name', [name for name in command.COMMANDS if 'train' not in name])
def test_every_command_tells_its_arguments(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f'yolos_jax.tools.{command.COMMANDS[name][0]}').main(['--help'])
    assert end.value.code == 0 and 'usage:' in capsys.readouterr().out


@pytest.mark.parametrize(('name', 'config', 'seed'), [('train', 'common', 42), ('pretrain', 'deit_ti', 0)])
def test_help_of_training_lists_every_key_of_a_config_with_its_comment(name, config, seed, tmp_path):
    done = yolos(name, '--help', cwd=tmp_path)
    assert done.returncode == 0 and '--workdir' in done.stdout
    configs = re.search('Configs by name: (.*)', done.stdout)[1].split(', ')
    assert ('finetune' in configs, 'deit_s' in configs) == (name == 'train', name == 'pretrain')
    assert re.search(rf"--config.seed={seed} +.*the reference's", done.stdout)
    for key in config_files.flat(importlib.import_module(f'yolos_jax.configs.{config}').get_config()):
        assert f'--config.{key}=' in done.stdout, key


def test_help_shows_the_values_of_the_config_that_is_named(tmp_path):
    done = yolos('train', '--config=yolos_ti', '--help', cwd=tmp_path)
    assert re.search(r'--config.model.width=192 +0: the model', done.stdout), done.stdout
    assert re.search(r'--config.augment.sizes=\(256,.*,608\) shorter sides', done.stdout), done.stdout
    done = yolos('train', '--help', '--config=nowhere', cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith('error: nowhere: no such config')


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['--config=quickstart'], '--workdir must be given'),
        (['--config=yolos_ti', '--workdir=w'], 'no data: name a folder (--config.data)'),
        (['--config=yolos_ti', '--workdir=w', '--coordinator=a:1', '--num_processes=2'], '(--process_id)'),
        (['--config', 'quickstart', '--workdir=w', '--config.batch_size=0'], 'batch_size is 0'),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_work_is_answered_in_one_line(arguments, says, tmp_path):
    done = yolos('train', *arguments, cwd=tmp_path)
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['--config=nowhere'], 'no installed one: deit_b'),
        (['--config=quickstart', '--config.nochs=1'], 'no key nochs'),
        (['--config=quickstart', '--config.epoch=1'], 'no key epoch. Did you mean "epochs"'),
        (['--config=quickstart', '--config.epochs=x'], 'invalid literal for int()'),
        (['--config=quickstart', '--config.model.widht=1'], 'Did you mean "width"'),
        (['--config=quickstart', '--wokdir=x'], 'Did you mean: workdir'),
        (['--config=finetune', *2 * ['--config.augment.sizes=(96,)']], 'augment.sizes is given twice'),
        (['--config=quickstart', '--width=9'], 'did you mean --config.model.width?'),
        (['--config=quickstart', 'config.epochs=3'], 'config.epochs=3 is not a flag'),
    ],
)
def test_a_flag_or_key_that_is_none_is_answered_with_the_nearest(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['yolos train', '--workdir=w', *arguments])
    with saved_flags(), pytest.raises(SystemExit) as end:
        cli.run_with_flags(pytest.fail, train.KEYS)
    assert end.value.code.startswith('error: ') and says in end.value.code
    assert '\n' not in end.value.code and not capsys.readouterr().err


def test_a_config_imports_the_files_beside_it_and_its_errors_are_one_line(tmp_path):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'base_of_ours.py').write_text('from yolos_jax.configs.quickstart import *')
    for name in ('base_of_ours', 'nothing_of_ours'):
        (tmp_path / 'configs' / 'ours.py').write_text(f'from {name} import get_config')
        done = yolos('train', '--config=configs/ours.py', '--workdir=w', '--config.data=no', cwd=tmp_path)
        says = 'no: no such data folder' if name.startswith('base') else "No module named 'nothing_of_ours'"
        assert done.returncode == 1 and says in done.stderr and done.stderr.count('\n') == 1, done.stderr
    wrong = 'from base_of_ours import *\nc = get_config()\nc.freeze = 6'
    (tmp_path / 'configs' / 'ours.py').write_text(wrong)
    done = yolos('train', '--config=configs/ours.py', '--workdir=w', cwd=tmp_path)
    assert 'ours.py:3: TypeError: Could not override' in done.stderr and done.stderr.count('\n') == 1, (
        done.stderr
    )


def test_characters_that_a_terminal_cannot_show_are_escaped(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(file := io.BytesIO(), 'ascii'))
    cli.run(lambda: print('café', flush=True))
    assert file.getvalue() == b'caf\\xe9\n'


def test_a_line_is_written_at_once_without_buffering(monkeypatch, tmp_path):
    log, seen = tmp_path / 'log', []
    with open(log, 'wb', buffering=0) as file:
        # as PYTHONUNBUFFERED makes it
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(file, write_through=True))
        cli.run(lambda: (print('a step'), seen.append(log.read_text())))
    assert seen == ['a step\n']


PRINTS = """
from pathlib import Path
from yolos_jax.run import cli

def main():
    print('0\\n' * 100_000)
    Path('done').touch()

cli.run(main)
"""


@pytest.mark.parametrize('ending', ['> /dev/full', '| true'])
def test_work_is_finished_even_if_stdout_cannot_be_written(ending, tmp_path):
    command = f'set -o pipefail; "{sys.executable}" -c "{PRINTS}" {ending}'
    done = subprocess.run(
        ['bash', '-c', command], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    says = 'error: stdout: No space left on device; everything else is done\n' if 'full' in ending else ''
    assert (done.returncode, done.stderr) == (bool(says), says) and (tmp_path / 'done').exists()


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&- >&- 2>&-'])
def test_closed_streams_do_not_matter_and_no_file_gets_their_numbers(closed, tmp_path):
    program = PRINTS.replace("Path('done').touch()", "(f := open('done', 'w')).write(str(f.fileno() > 2))")
    program = program.replace('def main():', 'def main():\n    sys.stdout.flush(), sys.stderr.isatty()')
    done = subprocess.run(
        ['bash', '-c', f'"{sys.executable}" -c "import sys{program}" {closed}'],
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0 and (tmp_path / 'done').read_text() == 'True'


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'gone')
    with pytest.raises(InputError, match='/link: cannot write to it .a link to nothing'):
        workdir.locked(tmp_path / 'link').__enter__()
    os.mkfifo(tmp_path / '.lock')
    with pytest.raises(InputError, match='cannot write to it .File or stream is not seekable'):
        workdir.locked(tmp_path).__enter__()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as a full disk
    try:
        with pytest.raises(InputError, match='/full: cannot write to it .File too large'):
            workdir.locked(tmp_path / 'full').__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_error_inside_a_config_file_is_not_blamed_on_a_flag(tmp_path):
    config = 'from yolos_jax.configs import yolos_ti\ndef get_config():\n  yolos_ti.get_config().epoch = 1'
    (tmp_path / 'own.py').write_text(config)
    error = yolos('train', '--config=own.py', '--workdir=w', cwd=tmp_path).stderr
    assert error.startswith('error: Key "epoch" does not exist') and len(error) < 120


def test_a_tilde_after_an_equals_sign_is_expanded(tmp_path):
    """bash expands ~ at the start of a word alone."""
    to_home = ('convert', '--input=~/nowhere.pth', '--output=out')
    assert f'{Path.home()}/nowhere.pth: no such' in yolos(*to_home, cwd=tmp_path).stderr


def test_a_config_is_found_by_name_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    installed = config_files.find('quickstart')
    assert installed.endswith('quickstart.py') and os.path.isabs(installed)
    assert config_files.find('configs/quickstart.py') == config_files.find('quickstart.py') == installed
    for other in ('my/quickstart.py', 'quickstart.txt', '/nowhere/configs/quickstart.py'):
        with pytest.raises(InputError, match='no such config file'):
            config_files.find(other)
    (tmp_path / 'quickstart').touch()
    assert config_files.find('quickstart') == 'quickstart'
    for named in (
        ['--config', 'yolos_b'],
        ['-config', 'yolos_b'],
        ['--config=yolos_b'],
        ['-config=yolos_b'],
    ):
        *_, last, other = config_files.resolved(['x', *named, '--a=1'])
        assert last.endswith(f'{os.sep}yolos_b.py') and other == '--a=1'


@pytest.mark.parametrize(
    ('error', 'status'),
    [('KeyboardInterrupt', 130), ('errors.DivergedError("x")', 3), ('ValueError("x")', 1)],
)
def test_the_exit_status_says_whether_a_command_was_interrupted_or_diverged(error, status):
    script = 'from yolos_jax import errors\nfrom yolos_jax.run import cli\n'
    script += f'def main():\n    raise {error}\ncli.run(main)'
    done = subprocess.run([sys.executable, '-c', script], env=ENVIRONMENT, capture_output=True)
    assert done.returncode == status


def test_a_full_disk_for_compiled_code_is_named():
    script = 'from yolos_jax.run import cli\ncli.run(lambda: open("/dev/full", "w").write("x" * 99999))'
    done = subprocess.run([sys.executable, '-c', script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stderr.startswith("error: No space left on device, perhaps for Numba's compiled code: set")


def test_the_garbage_collection_goes_on_once_a_command_is_imported():
    cli.imported('speed')
    assert gc.isenabled()


def test_each_value_that_a_pth_lacks_has_its_own_flag():
    flags.add_weights(parser := argparse.ArgumentParser())
    given = '--weights=x --heads=2 --pos_grid 3 4 --mid_pos_grid 5 6'.split()
    expected = {'heads': 2, 'pos_grid': [3, 4], 'mid_pos_grid': [5, 6]}
    assert flags.hints(parser.parse_args(given)) == expected


def test_an_error_of_a_positional_argument_names_no_flag():
    for argument, shown in (('data', None), ('output', 'output')):
        with pytest.raises(InputError) as error, cli.without_flags('data'):
            raise InputError('no such folder', argument)
        assert error.value.argument == shown


INTERRUPT = """
import gc, os, signal, sys

def interrupt(*_):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)

def at_import(event, arguments):
    if event == 'import' and arguments[0] == 'optax':
        gc.callbacks.append(interrupt)
        gc.collect()

sys.addaudithook(at_import)
"""


@pytest.mark.parametrize('script', ['train.py', 'eval.py'])
def test_ctrl_c_while_a_script_is_imported_is_not_lost(script, tmp_path):
    """Python swallows a KeyboardInterrupt in a callback of its garbage collector, and JAX installs one."""
    (tmp_path / 'sitecustomize.py').write_text(INTERRUPT)
    command = [sys.executable, script, '--config=configs/quickstart.py', f'--workdir={tmp_path}/run']
    environment = os.environ | {'PYTHONPATH': str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT, done.stderr


@pytest.mark.parametrize(
    ('name', 'arguments', 'says'),
    [
        ('predict.py', ['--weights=/nowhere', '--output={tmp}', 'README.md'], '/nowhere: no such file'),
        ('predict.py', ['--weights=/nowhere', '--output={tmp}', '/gone.jpg'], '/gone.jpg: no such file'),
        (
            'eval.py',
            ['--weights=README.md', '--data=.', '--output={tmp}'],
            r'not a known data set.* \(--data\)',
        ),
        (
            'convert_torch_weights.py',
            ['--input=README.md', '--output=configs'],
            r'not empty.* \(--output\)',
        ),
    ],
)
def test_scripts_say_what_is_wrong_in_one_line(name, arguments, says, tmp_path):
    command = [sys.executable, name, *(x.format(tmp=tmp_path / 'out') for x in arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and re.search(says, done.stderr)
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('module', [attention, predict, speed, tokens])
def test_commands_that_read_a_pth_take_flags_for_missing_values(module, capsys):
    with pytest.raises(SystemExit):
        module.main(['--help'])
    assert '--heads' in capsys.readouterr().out


def test_a_device_that_is_full_gets_advice():
    script = 'import jax.numpy as jnp\nfrom yolos_jax.run import cli\ncli.run(lambda: jnp.ones(1 << 43))'
    done = subprocess.run([sys.executable, '-c', script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stderr.startswith("error: out of the device's memory; docs/training.md")
    assert done.returncode == 1
