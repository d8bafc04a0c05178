"""Draws the curves of a run."""

from pathlib import Path

from yolos_jax import visualize
from yolos_jax.run import log, run_files


def draw(workdir: str | Path) -> None:
    """Draw curves.png from metrics.jsonl: losses and AP or accuracy, each on a scale of its own."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is a notebook's own

    lines = log.read_metrics(workdir)
    figure = Figure(figsize=(14, 4.5))
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.12, top=0.97, wspace=0.14)
    losses = 'loss', 'val_loss', 'loss_ce', 'loss_bbox', 'loss_giou'
    shown = losses, ('AP', 'top1'), ('AP50', 'AP75', 'top5')
    for axes, names in zip(figure.subplots(1, 3), shown, strict=True):
        for name in names:
            # an AP of -1 is that of no objects
            points = [(line['step'], line[name]) for line in lines if name in line and line[name] != -1]
            if points:
                steps, values = zip(*points, strict=True)
                style = '-' if name in losses and len(points) > 1 else '.-'
                axes.plot(steps, values, style, label=f'{name} {values[-1]:.3f}')
        axes.set_xlabel('step')
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.4)
        if axes.lines:
            axes.legend(title='last value')
    visualize.save(figure, Path(workdir) / run_files.CURVES)
