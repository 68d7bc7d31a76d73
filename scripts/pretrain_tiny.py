"""Pretrain the small language model that ships with rankwise.

A byte-level BPE tokenizer and a Llama-architecture model are trained on film reviews (Maas et al. 2011): the labelled
training reviews and the unlabelled ones. The reviews of the test split are never trained on; they measure the model.

    python scripts/pretrain_tiny.py --reviews ../shared/data/text --work runs/pretrain --out src/rankwise/models/reviews

The run is deterministic from its seed on one kind of machine and is resumed by the same command: the work folder holds
the tokens and one checkpoint (safetensors), replaced in one atomic step. Matrices inside the blocks are trained with
Muon (Jordan et al. 2024, as in ``torch.optim.Muon``), the embedding and the norms with AdamW; rows are short for most
of the training and of full context for the last part, which costs less and leaves the positions trained.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model_card import model_card

END, PAD = "<|endoftext|>", "<|pad|>"
TRAINING_FILES = ("imdb-train-pos", "imdb-train-neg", "imdb-train-unsup")
HELD_OUT_FILES = ("imdb-test-pos", "imdb-test-neg")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'].capitalize() + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """Everything the result depends on."""

    seed: int = 0
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 704
    context: int = 1024  # tokens in a row of the last part
    short_context: int = 256  # tokens in a row before
    long_share: float = 0.2  # share of all steps at full context
    tokens_per_step: int = 16384
    steps: int = 1200
    warmup_steps: int = 40
    decay_share: float = 0.5  # share of all steps in which the rate falls linearly to zero
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    weight_decay: float = 0.1
    held_out_reviews: int = 500  # of each test file


def read_reviews(folder: Path, names: tuple[str, ...], limit: int | None = None) -> list[str]:
    """Review texts with line breaks for their HTML; the first ``limit`` of each file."""
    texts: list[str] = []
    for name in names:
        column = pl.read_parquet(folder / f"{name}.parquet", columns=["text"])["text"]
        column = column.str.replace_all("<br />", "\n", literal=True).str.replace_all(r"\n{3,}", "\n\n")
        texts.extend(column.head(limit).to_list() if limit else column.to_list())
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: every string can be written; digits stand alone, so that numbers are spelled alike."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one uint16 stream, each after an end-of-text token."""
    end = tokenizer.token_to_id(END)
    pieces = [[end, *row.ids] for row in tokenizer.encode_batch(texts)]
    return np.concatenate([np.array(piece, dtype=np.uint16) for piece in pieces])


def new_model(settings: Settings) -> LlamaForCausalLM:
    """A fresh Llama with tied embeddings; matrices normal with 1/sqrt(fan-in), outputs of each block zero."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            elif "layers" in name and parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on the rest."""
    matrices = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if "layers" not in name or p.ndim != 2]
    return [
        torch.optim.Muon(matrices, lr=settings.matrix_lr, weight_decay=settings.weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=settings.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, settings: Settings) -> float:
    """Share of the peak learning rate at ``step``: linear warm-up, constant, linear decay to zero."""
    remaining = (settings.steps - step) / max(1, round(settings.decay_share * settings.steps))
    return min(1.0, (step + 1) / settings.warmup_steps, remaining)


def batch(stream: torch.Tensor, step: int, settings: Settings) -> torch.Tensor:
    """The rows of ``step``: consecutive windows of the stream, in an order shuffled by the seed for each pass."""
    long = step >= round((1 - settings.long_share) * settings.steps)
    length = settings.context if long else settings.short_context
    rows = settings.tokens_per_step // length
    block = settings.tokens_per_step  # one step's tokens come from blocks of this many, so both lengths share one order
    pieces = block // settings.context
    per_pass = (len(stream) - 1) // settings.context
    first = step * pieces
    picked = []
    for index in range(first, first + pieces):
        number, place = divmod(index, per_pass)
        generator = torch.Generator().manual_seed(settings.seed + number)
        start = int(torch.randperm(per_pass, generator=generator)[place]) * settings.context
        picked.append(stream[start : start + settings.context])
    return torch.cat(picked).view(rows, length)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16)


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats; the logits are cast to float32 first."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def save_checkpoint(
    path: Path, settings: Settings, step: int, model: LlamaForCausalLM, parts: list[torch.optim.Optimizer]
) -> None:
    """Weights and optimizer state in one safetensors file, replaced atomically."""
    tensors = {f"model/{name}": p.detach().cpu() for name, p in model.named_parameters()}
    for number, part in enumerate(parts):
        for index, state in part.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer/{number}/{index}/{key}"] = torch.as_tensor(value).cpu()
    temporary = path.with_suffix(".partial")
    metadata = {"step": str(step), "settings": json.dumps(asdict(settings))}
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, temporary, metadata=metadata)
    temporary.replace(path)


def load_checkpoint(path: Path, settings: Settings, model: LlamaForCausalLM, parts: list[torch.optim.Optimizer]) -> int:
    """Restore what :func:`save_checkpoint` wrote; returns the next step, 0 where there is no checkpoint.

    Raises:
        ValueError: the checkpoint is of other settings.
    """
    if not path.exists():
        return 0
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in parts]
    with safe_open(path, framework="pt") as file, torch.no_grad():
        parameters = dict(model.named_parameters())
        for name in file.keys():
            kind, rest = name.split("/", 1)
            if kind == "model":
                parameters[rest].copy_(file.get_tensor(name))
            else:
                number, index, key = rest.split("/")
                states[int(number)].setdefault(int(index), {})[key] = file.get_tensor(name)
        step = int(file.metadata()["step"])
        if json.loads(file.metadata().get("settings", "null")) not in (None, asdict(settings)):
            raise ValueError(f"{path} is of other settings: give another --work folder")
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
    return step


@torch.no_grad()
def nats_and_bits(
    model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str], context: int
) -> tuple[float, float, int]:
    """Cross-entropy in nats per token and bits per byte over windows of ``context``, and the tokens counted."""
    device = next(model.parameters()).device
    stream = torch.from_numpy(encode(tokenizer, texts).astype(np.int64))
    total, count = 0.0, 0
    for start in range(0, len(stream) - 1, context):
        rows = stream[None, start : start + context + 1].to(device)
        logits = model(input_ids=rows[:, :-1]).logits.float()
        total += torch.nn.functional.cross_entropy(logits[0], rows[0, 1:], reduction="sum").item()
        count += rows.shape[1] - 1
    size = sum(len(text.encode()) for text in texts)
    return total / count, total / math.log(2) / size, count


def unigram_nats(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """Cross-entropy of held-out tokens under add-one smoothed token frequencies of the training stream."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, start: str, tokens: int = 80) -> str:
    """A continuation of ``start`` at temperature 0.8 over the 50 likeliest tokens, seeded."""
    torch.manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.tensor([[0, *tokenizer.encode(start).ids]], device=device)
    out = model.generate(ids, max_new_tokens=tokens, do_sample=True, temperature=0.8, top_k=50)
    return tokenizer.decode(out[0].tolist(), skip_special_tokens=True)


def train(settings: Settings, stream: np.ndarray, work: Path, device: torch.device, compiled: bool) -> LlamaForCausalLM:
    """Run or resume the training; a line of metrics every 20 steps in ``work/metrics.jsonl``."""
    torch.manual_seed(settings.seed)
    model = new_model(settings).to(device)
    parts = optimizers(model, settings)
    peaks = [[group["lr"] for group in part.param_groups] for part in parts]
    checkpoint = work / "checkpoint.safetensors"
    first = load_checkpoint(checkpoint, settings, model, parts)
    tokens = torch.from_numpy(stream.astype(np.int64))
    step_loss = torch.compile(loss_of) if compiled else loss_of
    started = time.perf_counter()
    for step in range(first, settings.steps):
        for part, peak in zip(parts, peaks, strict=True):
            for group, lr in zip(part.param_groups, peak, strict=True):
                group["lr"] = lr * rate(step, settings)
        with autocast(device):
            loss = step_loss(model, batch(tokens, step, settings).to(device))
        loss.backward()
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)
        if step % 20 == 0 or step + 1 == settings.steps:
            speed = (step + 1 - first) * settings.tokens_per_step / (time.perf_counter() - started)
            line = {"step": step, "loss": round(loss.item(), 4), "tokens_per_second": round(speed)}
            print(json.dumps(line), flush=True)
            with (work / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if (step + 1) % 200 == 0 or step + 1 == settings.steps:
            save_checkpoint(checkpoint, settings, step + 1, model, parts)
    return model


def prepare(settings: Settings, reviews: Path, work: Path) -> tuple[Tokenizer, np.ndarray]:
    """Tokenizer and training stream, made once and kept in the work folder."""
    tokenizer_file, stream_file = work / "tokenizer.json", work / "tokens.npy"
    if not stream_file.exists():
        texts = read_reviews(reviews, TRAINING_FILES)
        tokenizer = train_tokenizer(texts, settings.vocabulary)
        tokenizer.save(str(tokenizer_file))
        temporary = stream_file.with_suffix(".partial.npy")
        np.save(temporary, encode(tokenizer, texts))
        temporary.replace(stream_file)
    return Tokenizer.from_file(str(tokenizer_file)), np.load(stream_file)


def write_package(
    settings: Settings, model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, card: dict[str, Any]
) -> None:
    """Model (bfloat16), tokenizer and measurements in Hugging Face form."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=settings.context,
        padding_side="right",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    out.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "measurements.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    (out / "README.md").write_text(model_card(card))


def measure(
    settings: Settings, model: LlamaForCausalLM, tokenizer: Tokenizer, stream: np.ndarray, reviews: Path
) -> dict[str, Any]:
    """What the model card states: the shipped bfloat16 weights, computed in float32."""
    model.to(torch.bfloat16).float().eval()
    held_out = read_reviews(reviews, HELD_OUT_FILES, settings.held_out_reviews)
    wikitext = [(reviews / "test.txt").read_text()]
    card: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "stream_tokens": len(stream),
        "training_tokens": settings.steps * settings.tokens_per_step,
        "passes": round(settings.steps * settings.tokens_per_step / len(stream), 3),
        "settings": asdict(settings),
    }
    for name, texts in {"held_out_reviews": held_out, "wikitext2_test": wikitext}.items():
        nats, bits, count = nats_and_bits(model, tokenizer, texts, settings.context)
        unigram = unigram_nats(stream, encode(tokenizer, texts), settings.vocabulary)
        card[name] = {
            "nats_per_token": round(nats, 4),
            "bits_per_byte": round(bits, 4),
            "unigram_nats_per_token": round(unigram, 4),
            "tokens": count,
        }
    starts = ("This film", "The acting", "I watched this movie with my family and")
    card["samples"] = [sample(model, tokenizer, start) for start in starts]
    return card


def arguments() -> Iterator[tuple[str, type, object]]:
    """Each setting as a command-line option."""
    for name, value in asdict(Settings()).items():
        yield f"--{name.replace('_', '-')}", type(value), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True, help="folder with imdb-*.parquet and test.txt")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, checkpoint and metrics")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile the step")
    for option, kind, default in arguments():
        parser.add_argument(option, type=kind, default=default)
    options = vars(parser.parse_args())
    settings = Settings(**{name: options[name] for name in asdict(Settings())})
    torch.set_num_threads(options["threads"])
    work: Path = options["work"]
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, stream = prepare(settings, options["reviews"], work)
    model = train(settings, stream, work, device, options["compile"])
    card = measure(settings, model, tokenizer, stream, options["reviews"])
    write_package(settings, model, tokenizer, options["out"], card)
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
