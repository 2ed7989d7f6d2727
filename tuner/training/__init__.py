"""Training: the setup of a run, the heads, the loop, the CUDA graph, checkpoints."""
