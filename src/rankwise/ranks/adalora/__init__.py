"""AdaLoRA through PEFT, with its allocator driven rightly (arXiv 2303.10512)."""
