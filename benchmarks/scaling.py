"""What more chips would give: a model of a training step with one image (Ti: two) per chip.

    python benchmarks/scaling.py [--utilisation=0.35]

A step computes for FLOPs / (peak x utilisation) and sums its gradients in a ring, where a chip sends
2 (n - 1) / n of their bytes. The two efficiencies printed assume that XLA hides none or all of
that behind the backward pass. Peaks and link speeds are those the makers publish; the bytes are those of
benchmarks/tpu_compile.py.
"""

import argparse

# bf16 peak in FLOP/s; bytes/s a chip sends over its links in one direction; the chips of the largest slice;
# bytes/s of a chip's share of the network between slices
CHIPS = {
    'v5e': (197e12, 200e9, 256, 3.1e9),
    'v5p': (459e12, 600e9, 8960, 6.25e9),
    'H100': (989e12, 450e9, 8, 50e9),
}
# width, depth, mean tokens of the recipe on COCO with [CLS] and [DET], images per chip, bytes of gradients
MODELS = {
    'Ti': (192, 12, 985 + 101, 2, 15.0e6),
    'S': (384, 12, 2092 + 101, 1, 79.6e6),
    'B': (768, 12, 2092 + 101, 1, 340.0e6),
}


def flops(width, depth, tokens):
    """Of an image's forward and backward pass: 24 N D^2 + 4 N^2 D a block, three times."""
    return 3 * depth * (24 * tokens * width**2 + 4 * tokens**2 * width)


def sending(size, chips, link, slice_size, between):
    """Seconds of summing `size` bytes over the chips: within slices, then a slice's share between them."""
    inside = min(chips, slice_size)
    seconds = 2 * (inside - 1) / inside * size / link
    slices = chips // inside
    return seconds + (2 * (slices - 1) / slices * size / inside / between if slices > 1 else 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--utilisation', type=float, default=0.35, help='of the peak, while computing')
    args = parser.parse_args()
    print('chip  model  chips  computing  sending  images/s  efficiency: none .. all of the sending hidden')
    for chip, (peak, *network) in CHIPS.items():
        for model, (width, depth, tokens, images, size) in MODELS.items():
            compute = images * flops(width, depth, tokens) / (peak * args.utilisation)
            for chips in (8, 64, 256, 1024):
                send = sending(size, chips, *network)
                worst, best = compute / (compute + send), compute / max(compute, send)
                print(
                    f'{chip:5} {model:5} {chips:6} {1e3 * compute:7.1f} ms {1e3 * send:5.1f} ms '
                    f'{chips * images * worst / compute:9,.0f}  {worst:.0%} .. {best:.0%}'
                )


if __name__ == '__main__':
    main()
