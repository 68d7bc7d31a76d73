"""Allocating LoRA: directions move to the layers that need them (arXiv 2403.16187, there called ALoRA)."""
