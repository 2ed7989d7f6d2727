"""Training: what a run is made of, the heads, the loop, the CUDA graph, checkpoints."""
