"""Pre-train a ViT: the same as `yolos pretrain`."""

from yolos_jax.run import cli

if __name__ == '__main__':
    cli.start('pretrain')
