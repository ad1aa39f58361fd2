"""From files on disk to batches of tensors on the CPU. Knows no ranks beyond (rank, size), never imports megatron."""
