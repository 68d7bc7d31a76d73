"""What is saved of an adapter, and the file of its weights: safetensors, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankwise.errors import UserError
from rankwise.processes import held_whole


def adapter_weights(folder: str | Path, subfolder: str | None = None, **download: Any) -> Path:
    """The file of a saved adapter's weights, once it is known to be one of safetensors.

    To be asked before PEFT loads a folder: where there is no such file, PEFT takes a pickle.

    Args:
        folder: a local folder, or a repository of the Hugging Face Hub.
        subfolder: where the adapter lies within it.
        download: passed on to ``huggingface_hub.hf_hub_download``.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    path = Path(folder, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
    try:
        if not Path(folder).exists():
            path = Path(hf_hub_download(str(folder), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download))
        with safe_open(path, framework="pt"):
            return path
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} holds no {path.name}: {_remedy(path.parent)}") from error
    except (SafetensorError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{path} cannot be read ({said}): save the adapter again") from error


def adapter_state(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """An adapter's tensors by name, as PEFT saves them; no process waits for others where the base is spread."""
    whole = held_whole(model)
    found: dict[str, Tensor] = get_peft_model_state_dict(model, whole, adapter, save_embedding_layers=False)
    return found


def _remedy(folder: Path) -> str:
    if not (folder / WEIGHTS_NAME).is_file():
        return "give the folder of a whole adapter"
    return f"{WEIGHTS_NAME} is a pickle, which can run code and is not read; save the adapter as safetensors"
