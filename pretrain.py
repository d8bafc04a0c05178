"""Pre-train a ViT: a script, as `yolos pretrain` is."""

from yolos_jax.run import cli

if __name__ == '__main__':
    cli.start('pretrain')
