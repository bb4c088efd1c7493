"""Time and memory of crossfade, measured beside the published PyTorch formulations in one process."""
