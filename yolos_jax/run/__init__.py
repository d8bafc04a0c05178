"""What keeps a run alive: the mesh, the cluster, checkpoints, the workdir, and the training loop."""
