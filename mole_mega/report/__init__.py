"""A run's report, from the files that the run left behind. Never imports torch or Megatron-Core."""
