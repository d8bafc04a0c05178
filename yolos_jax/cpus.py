"""Counts the CPUs that this process may use, which can be fewer than the machine has."""

import contextlib
import os
from pathlib import Path


def usable(root: Path = Path('/')) -> int:
    """The number of CPUs in the process's affinity (taskset, Slurm), or fewer by its control group's quota.

    root: of the file system with /proc and /sys.
    """
    quotas = [quota for folder in _groups(root) if (quota := _quota(folder)) is not None]
    return max(int(min([len(affinity()), *quotas])), 1)


def affinity() -> list[int]:
    """The ids of the CPUs that the process may run on; all CPUs if the system does not tell."""
    if hasattr(os, 'sched_getaffinity'):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _groups(root: Path) -> list[Path]:
    """The folders of the process's control group and of its parent groups, cgroup version 1 or 2."""
    folders = []
    with contextlib.suppress(OSError):
        for line in (root / 'proc/self/cgroup').read_text().splitlines():
            _, controllers, name = line.split(':', 2)
            if controllers and 'cpu' not in controllers.split(','):
                continue
            top = root / 'sys/fs/cgroup' / controllers  # version 2 has no controllers here
            group = top / name.lstrip('/')
            folders += [group, *(x for x in group.parents if x.is_relative_to(top))]
    return folders


def _quota(folder: Path) -> float | None:
    """CPUs that a control group may use at once; None without a quota."""
    with contextlib.suppress(OSError, ValueError):
        if (folder / 'cpu.max').exists():
            quota, period = (folder / 'cpu.max').read_text().split()
        else:
            quota, period = ((folder / f'cpu.cfs_{x}_us').read_text() for x in ('quota', 'period'))
        return int(quota) / int(period) if quota.strip() != 'max' and int(quota) > 0 else None
    return None
