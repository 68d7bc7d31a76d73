"""What a training survives: crashes and requests to stop, and steps whose loss is no number."""

from rankwise.checkpoints.trainer import CheckpointedTrainer

__all__ = ["CheckpointedTrainer"]
