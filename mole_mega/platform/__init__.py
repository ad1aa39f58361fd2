"""Where the machine shows: process groups, and what Megatron-Core needs to run without CUDA."""
