"""LoRA and mixtures of LoRA experts: the maths, where tensors live, and the layers."""
