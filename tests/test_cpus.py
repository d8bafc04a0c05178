"""Threads come from the CPUs that a process may use."""

import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

from yolos_jax import cpus


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.skipif(not shutil.which('taskset'), reason='needs taskset')
def test_a_pinned_process_has_the_cpus_it_is_pinned_to():
    command = [
        'taskset',
        '-c',
        '0',
        sys.executable,
        '-c',
        'from yolos_jax import cpus; print(cpus.usable())',
    ]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == '1\n'


@pytest.mark.parametrize(
    'files',
    [
        {
            'proc/self/cgroup': '0::/a/b\n',
            'sys/fs/cgroup/a/cpu.max': '150000 100000\n',
        },  # of the group above
        {'proc/self/cgroup': '0::/\n', 'sys/fs/cgroup/cpu.max': '50000 100000\n'},  # a container's
        {
            'proc/self/cgroup': '5:memory:/a\n3:cpu,cpuacct:/a\n',
            'sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us': '100000\n',
            'sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us': '100000\n',
        },
    ],
)
def test_the_quota_of_a_control_group_counts(tmp_path, files):
    write(tmp_path, files)
    assert cpus.usable(tmp_path) == 1


@pytest.mark.parametrize('content', ['max 100000\n', '', 'nonsense'])
def test_without_a_quota_the_affinity_counts(tmp_path, content):
    everywhere = cpus.usable(tmp_path)
    write(tmp_path, {'proc/self/cgroup': '0::/\n', 'sys/fs/cgroup/cpu.max': content})
    assert cpus.usable(tmp_path) == everywhere
