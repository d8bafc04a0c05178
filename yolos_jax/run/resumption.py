"""Decides whether a config continues the run that a folder holds, or begins a new one in it."""

import contextlib
from pathlib import Path

import jax
from ml_collections import ConfigDict

import yolos_jax
from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.run import config_checks, config_files, run_files
from yolos_jax.run.workdir import Workdir
from yolos_jax.weights import checkpoint

# keys that may differ when a run resumes: they change what is written, not what is computed
FREE = set(
    'data train_json train_images val_json val_images init_from teacher data_cache bad_images log_every '
    'save_every eval_every patience spike_factor model.remat shard_params accumulate_steps'.split()
)


def resumed(config: ConfigDict, known: ConfigDict, work: Workdir) -> tuple[ConfigDict, dict, list[str]]:
    """The completed config, the meta of the run in the folder ({} for a new run), and notes.

    known: a config with all keys.

    Raises:
        InputError: the saved run has another config, the config of a new run has an unknown key, a value
            is not UTF-8, or a new run would overwrite other files.
    """
    config = completed(config, known)
    config_checks.check_types(config, known)
    config_checks.check_text(config)
    if saved := checkpoint.newest_meta(work.folder / checkpoint.FOLDER):
        return config, saved, _continue(saved, config, work.folder)
    # new runs only: a saved run of an earlier version may have other keys
    config_checks.check_keys(config, known)
    check_new(work.folder)
    return config, {}, []


def _continue(saved: dict, config: ConfigDict, folder: Path) -> list[str]:
    """Set the config's `init_from` to that of the saved run; returns notes. Raises as `resumed`."""
    if 'config' not in saved:
        raise InputError(
            f'{folder}: its checkpoints are not from a run; use another folder, and this one as init_from',
            'workdir',
        )
    notes = check_same(saved['config'], config_files.flat(config), folder)
    began = saved['config'].get('init_from', config.init_from)  # for the model card
    if began != config.init_from:
        notes.append(f'init_from stays {began!r}: a resumed run uses its own weights')
        with config.unlocked():
            config.init_from = began
    before = saved.get('training', {}).get('software', versions())
    if before != versions():
        notes.append(f'saved with {before}, now {versions()}: results agree within rounding')
    return notes


def completed(config: ConfigDict, known: ConfigDict) -> ConfigDict:
    """A config with the default values of `known` for keys that are newer than the config."""
    result = known.copy_and_resolve_references()
    with result.unlocked(), result.ignore_type():
        result.update(config.copy_and_resolve_references())
    return result


def check_new(folder: Path) -> None:
    """Raises InputError if a folder that no run left has files that a run writes."""
    with contextlib.suppress(InputError):  # missing or damaged
        if {'learning_rate', 'init_from', 'val_split'} <= files.read_json(folder / run_files.CONFIG).keys():
            return
    others = [name for name in run_files.WRITTEN if (folder / name).exists()]
    if others and not (folder / 'index').exists():
        raise InputError(
            f'{folder}: holds no run, but {", ".join(others)}, which a run would overwrite; name another '
            'folder',
            'workdir',
        )


def check_same_data(saved: dict, current: dict, workdir: Path) -> None:
    """Raises InputError if a resumed run's data are not those it was trained on.

    saved, current: {split: `Records.digests`}; where the data lie does not matter.
    """
    differ = [
        f'{name} of {split}'
        for split, digests in current.items()
        for name, digest in digests.items()
        if saved.get(split, {}).get(name, digest) != digest
    ]
    if differ:
        raise InputError(
            f'{workdir}: holds a run on other data ({", ".join(differ)} differ); use another workdir, or '
            'the same data'
        )


def check_same(saved: dict, current: dict, workdir: Path) -> list[str]:
    """Compare a resumed run's config with the saved one, both as `flat` makes them.

    The only accepted change of the computation is a larger number of epochs.

    Returns:
        Notes for the user on that change.

    Raises:
        InputError: they differ.
    """

    def differs(key: str) -> bool:
        if key not in saved:  # the version that saved it lacked this key: it was off
            return key not in FREE and bool(current[key])
        if key == 'epochs':
            return current[key] < saved[key]
        return key not in FREE and saved[key] != current.get(key)

    kinds = ['a pre-training' if config_files.is_pretraining(x) else 'a detector' for x in (saved, current)]
    if len(set(kinds)) > 1:
        raise InputError(f'{workdir}: holds a run of {kinds[0]}; {kinds[1]} needs another workdir')
    differ = [
        f'{key}: {saved.get(key)!r} then, {current.get(key)!r} now'
        for key in sorted(saved.keys() | current.keys())
        if differs(key)
    ]
    if differ:
        raise InputError(
            f'{workdir}: holds a run with another config ({"; ".join(differ)}); use another workdir, or '
            'the same values'
        )
    before, now = saved['epochs'], current['epochs']
    if now <= before:
        return []
    return [f'{now} epochs instead of {before}: from here on the learning rate is that of {now} epochs']


def versions() -> str:
    """The versions that a run's numbers depend on."""
    return f'yolos_jax {yolos_jax.__version__}, jax {jax.__version__}'
