"""Sparse mixture-of-LoRA-experts fine-tuning of LLaVA on Megatron-Core layers."""

__version__ = "0.1.0"
