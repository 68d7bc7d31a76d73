"""SoRA: gates that close while training, and the smaller LoRA that is left (arXiv 2311.11696)."""
