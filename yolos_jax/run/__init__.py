"""Training runs: the mesh, the cluster, checkpoints, the workdir, and the training loop."""
