"""In what order? Preference training of one chosen answer against many rejected ones."""

from rankwise.preferences.config import SoftmaxDPOConfig
from rankwise.preferences.loss import softmax_dpo_loss
from rankwise.preferences.trainer import SoftmaxDPOTrainer

__all__ = ["SoftmaxDPOConfig", "SoftmaxDPOTrainer", "softmax_dpo_loss"]
