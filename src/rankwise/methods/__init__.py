"""What is it compared with? Every method of the recipe as a model that trains, saves, loads and shows its base."""

from rankwise.methods.bottleneck import BottleneckConfig
from rankwise.methods.in_place import base_of
from rankwise.methods.models import adapter_config, load_stage, save_stage, stage_config, with_adapter

__all__ = [
    "BottleneckConfig",
    "adapter_config",
    "base_of",
    "load_stage",
    "save_stage",
    "stage_config",
    "with_adapter",
]
