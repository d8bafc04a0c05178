"""How many CPUs this process may use, which on shared machines are fewer than there are."""

import contextlib
import os
from pathlib import Path


def usable(root: Path = Path('/')) -> int:
    """The CPUs of the process's affinity (taskset, Slurm), or fewer where its control group has a quota.

    root: of the file system, where /proc and /sys are.
    """
    quotas = [quota for folder in _groups(root) if (quota := _quota(folder)) is not None]
    return max(int(min([len(affinity()), *quotas])), 1)


def affinity() -> list[int]:
    """The numbers of the CPUs that the process may run on; all of them where the system does not say."""
    if hasattr(os, 'sched_getaffinity'):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _groups(root: Path) -> list[Path]:
    """The folders of the process's control group and of all above it, of either version."""
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
    """CPUs that a control group may use at once; None where it says nothing."""
    with contextlib.suppress(OSError, ValueError):
        if (folder / 'cpu.max').exists():
            quota, period = (folder / 'cpu.max').read_text().split()
        else:
            quota, period = ((folder / f'cpu.cfs_{x}_us').read_text() for x in ('quota', 'period'))
        return int(quota) / int(period) if quota.strip() != 'max' and int(quota) > 0 else None
    return None
