import re
import shlex
import subprocess

import pytest
import yaml
from absl import flags
from helpers import ROOT

from yolos_jax.tools import train  # noqa: F401  defines the flags

FILES = sorted((ROOT / 'launch').iterdir())
OF_OTHERS = {  # flags of srun, sbatch and scancel, of gcloud, and of uv
    'skypilot.yaml': 'python seed',
    'slurm.sh': 'cpus-per-task dependency gpus-per-node job-name kill-on-bad-exit name nodes '
    'ntasks-per-node open-mode signal state time user',
    'tpu.sh': 'accelerator-type command exclude force node-id python runtime-version seed user worker zone',
}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_a_launch_file_parses_and_is_edited_in_two_places(path):
    text = path.read_text()
    if path.suffix == '.sh':
        subprocess.run(['bash', '-n', path], check=True)
    else:
        content = yaml.safe_load(text)
        runs = [content['run'], content['setup']] if 'run' in content else []
        for script in runs:
            subprocess.run(['bash', '-n'], input=script, text=True, check=True)
    assert re.findall(r'# Edit (\d):', text) == ['1', '2']


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_a_launch_file_calls_train_with_flags_it_has(path):
    text = path.read_text()
    assert 'train.py' in text
    from configs import yolos_ti

    config = yolos_ti.get_config()
    assert all(key in config for key in re.findall(r'--config\.([a-z_.]+)=', text))
    asked = set(re.findall(r'--([a-z][\w-]*)\b(?!\.)', text))
    assert asked - set(flags.FLAGS) == set(OF_OTHERS.get(path.name, '').split())
    assert {'workdir', 'config'} <= asked
    assert '--config.init_from=' in text  # the recipe starts from DeiT
    assert len(asked & {'coordinator', 'num_processes', 'process_id'}) in (0, 3)


def test_ssh_starts_one_numbered_process_on_every_machine(tmp_path):
    """With an ssh that prints what it was asked to run."""
    fake = tmp_path / 'ssh'
    fake.write_text('#!/bin/sh\n[ "$1" = -tt ] && shift\necho "$1 runs $2"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        ['bash', ROOT / 'launch' / 'ssh.sh'],
        env={'PATH': f'{tmp_path}:/usr/bin:/bin'},
        capture_output=True,
        text=True,
        check=True,
    )
    for i in range(2):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f'[{i}] host{i} runs')]
        words = shlex.split(line)
        assert {'--coordinator=host0:9731', '--num_processes=2', f'--process_id={i}'} <= set(words)


def test_ssh_passes_lines_on_as_they_come_and_asks_for_a_terminal_without_bars(tmp_path):
    """With an ssh whose process writes one line, as through a terminal, and waits a minute for a file."""
    fake, read = tmp_path / 'ssh', tmp_path / 'read'
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = -tt ] || exit 0\nprintf "step 1 on $TERM\\r\\n"\n'
        f'for i in $(seq 600); do [ -e {read} ] && exit 0; sleep 0.1; done\nexit 1\n'
    )
    fake.chmod(0o755)
    command, path = ['bash', ROOT / 'launch' / 'ssh.sh'], {'PATH': f'{tmp_path}:/usr/bin:/bin'}
    with subprocess.Popen(command, env=path, stdout=subprocess.PIPE) as launched:
        lines = sorted(launched.stdout.readline() for _ in range(2))
        read.touch()
    assert lines == [b'[0] step 1 on dumb\n', b'[1] step 1 on dumb\n'] and launched.returncode == 0


@pytest.mark.parametrize('code', [5, 255])  # of the process, and of an ssh that cannot connect
def test_ssh_ends_the_others_when_one_fails_at_its_start(code, tmp_path):
    """With an ssh to a host that fails, and one that runs until it is told to end."""
    fake = tmp_path / 'ssh'
    told = tmp_path / 'told'
    fake.write_text(
        '#!/bin/sh\n'
        f'[ "$1" = -tt ] || {{ echo "$*" >> {told}; exit 0; }}\n'
        f'[ "$2" = host1 ] && exit {code}\n'
        f'until grep -q "host0 kill -TERM" {told} 2> /dev/null; do sleep 0.1; done\nexit 143\n'
    )
    fake.chmod(0o755)
    path = {'PATH': f'{tmp_path}:/usr/bin:/bin'}
    command = ['bash', ROOT / 'launch' / 'ssh.sh']
    done = subprocess.run(command, env=path, capture_output=True, text=True)
    assert done.returncode == max(code, 143), done.stderr
    assert sum('kill -TERM' in line for line in told.read_text().splitlines()) == 2
