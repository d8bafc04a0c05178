"""Convert a data set in any supported layout to tensorflow-datasets, without TensorFlow.

    yolos tfds FOLDER DIR

writes DIR/coco/2017/1.1.0, in the layout of tensorflow-datasets' own coco/2017 with array_record files:
few large files, which network file systems prefer to 118,000 small ones. It is a data folder for training
and evaluation. The splits train2017 and val2017 become train and validation, others keep their names.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from yolos_jax import evaluation, files
from yolos_jax.data import array_records, records, sources
from yolos_jax.errors import InputError
from yolos_jax.run import cli
from yolos_jax.tools import flags
from yolos_jax.tools.tfds_builder import Coco


def build(root: str | Path, out: str | Path) -> Path:
    """Prepare the data set; returns its folder.

    Raises:
        InputError: `out` has one already, the data are incomplete, or its splits have different categories.
    """
    if (folder := Path(out) / 'coco' / '2017' / '1.1.0').exists():
        raise InputError(f'{folder}: has a data set already; choose another folder')
    splits, by_split = {}, {}
    for split in sources.splits(root):
        by_split[split] = sources.find(root, split)
        records.from_source(by_split[split])  # raises if something is wrong
        a = by_split[split].load()
        images, file_names = by_split[split].images(a.files)
        splits[split] = images, dataclasses.replace(a, files=file_names, categories=sorted(a.categories))
    categories = [a.categories for _, a in splits.values()]
    if any(other != categories[0] for other in categories):
        raise InputError(f'{root}: the categories of {" and ".join(splits)} are not the same')
    with files.new_folder(folder) as part, tempfile.TemporaryDirectory() as empty:
        builder = Coco(splits, data_dir=str(part / 'build'))
        builder.download_and_prepare(download_dir=empty)
        for path in Path(builder.data_dir).iterdir():
            path.rename(part / path.name)
        shutil.rmtree(part / 'build')
        (part / 'annotations').mkdir()
        for split, source in by_split.items():
            truth = part / 'annotations' / f'{sources.PREFIX}{array_records.coco_name(split)}.json'
            if source.truth:
                shutil.copy(source.truth, truth)
            else:
                files.write_json(truth, evaluation.coco_content(source.load()))
        files.write_json(part / array_records.CATEGORIES, categories[0])
    return folder


@cli.without_flags('data')
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and build."""
    parser = flags.parser(__doc__)
    parser.add_argument('data', help='a data folder')
    parser.add_argument('out', help='where to put coco/2017/1.1.0')
    args = parser.parse_args(arguments)
    print(build(args.data, args.out))


if __name__ == '__main__':
    cli.run(main)
