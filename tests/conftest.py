"""What holds for every test: one thread a process, no network, and where the real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read by the libraries when they are first imported, and inherited by the commands that tests start.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(name, "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("RANKWISE_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; a test that asks for it is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set RANKWISE_DATA to its folder")
    return DATA


@pytest.fixture(scope="session")
def data_folder(real_data: Path) -> Path:
    """The same folder under its other name."""
    return real_data


SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A small model learns which film a reader would like to see next.",
    "Question: what is two and two? Answer: four.",
    "Once upon a time there was a river, and the river had a name.",
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The small tokenizer."""
    return byte_tokenizer()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with one token for both ends of a text and another for padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )


def seeded_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of two layers with seeded random weights, in float32, ready to evaluate."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The small Llama, new for each test."""
    return seeded_llama(tiny_tokenizer)


@pytest.fixture(scope="session")
def model_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama and its tokenizer, saved; nothing may change what is in it."""
    return save_base(tiny_tokenizer, tmp_path_factory.mktemp("base"))


def save_base(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write the small Llama and its tokenizer into a folder."""
    seeded_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
