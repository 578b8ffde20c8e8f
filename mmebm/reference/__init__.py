"""The ops in plain PyTorch: the ground truth of every backend, the default where no other is there, and fp64."""
