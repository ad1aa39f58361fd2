"""LLaVA composed of Megatron-Core parts."""
