"""How is it shipped? Any trained adapter as a plain LoRA on the original base, or as merged weights."""

from rankwise.exporting.adapter import ExportReport, Layout, check_export, export

__all__ = ["ExportReport", "Layout", "check_export", "export"]
