"""What a run shows of itself: metrics, throughput, TensorBoard."""
