"""How much the sources of a mixture fight over one shared LoRA, measured before a cluster is spent on it."""
