"""How is it shipped? Any trained adapter as a plain LoRA on the original base, or as merged weights."""

from rankwise.exporting.adapter import ExportReport, Layout, export

__all__ = ["ExportReport", "Layout", "export"]
