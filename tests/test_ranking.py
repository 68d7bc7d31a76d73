from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from rankwise.errors import UserError
from rankwise.generation import generate_answers
from rankwise.recommend import ranking
from rankwise.recommend.ranking import EncodedCase, encode_cases, score_candidates
from rankwise.tokenise import encode_answer, encode_prompt

PROMPTS = ["I have seen #!#. Next is", "$", "A long list of films: #!#!#!#!#!#!#! and so on. Next is", "Seen"]
ANSWERS = [[" ?", " @@@", " river"], ["+"], [" the fox", " %", " =", " a name", "&"], [" film", " film 2"]]


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """Sharper than at its start, so that scores differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in tiny_llama.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return tiny_llama


def encoded(tokenizer: PreTrainedTokenizerFast, context: int = 256, repeated: int = 1) -> list[EncodedCase]:
    return encode_cases(tokenizer, PROMPTS * repeated, ANSWERS * repeated, context)[0]


@torch.no_grad()
def alone(model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> float:
    """The answer's log-probability, from one whole sequence."""
    row = encode_answer(tokenizer, prompt, answer, 256)
    assert row is not None
    ids, first = torch.tensor(row.input_ids), row.labels.count(-100)
    logs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return float(logs[torch.arange(first - 1, len(ids) - 1), ids[first:]].sum())


@pytest.fixture(params=["trees", "cache"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to read a prompt once; the second is for models that take no trees."""
    if request.param == "cache":
        monkeypatch.setattr(ranking, "why_no_trees", lambda *_: "it is told not to")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch_tokens", [1, 150, 600, 16384])
def test_scores_are_those_of_whole_sequences(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, batch_tokens: int
) -> None:
    scores = score_candidates(model, encoded(tiny_tokenizer), tiny_tokenizer.pad_token_id, batch_tokens)
    assert [len(one) for one in scores] == [3, 1, 5, 2]
    for prompt, answers, found in zip(PROMPTS, ANSWERS, scores, strict=True):
        expected = [alone(model, tiny_tokenizer, prompt, answer) for answer in answers]
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_models_with_absolute_positions(tiny_tokenizer: PreTrainedTokenizerFast, family: str) -> None:
    torch.manual_seed(0)
    size, pad = len(tiny_tokenizer), tiny_tokenizer.pad_token_id
    model: nn.Module
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3))
    else:
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=size,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=24,
                word_embed_proj_dim=16,
                pad_token_id=pad,
                init_std=0.3,
            )
        )
    model.eval()
    scores = score_candidates(model, encoded(tiny_tokenizer), pad)
    for prompt, answers, found in zip(PROMPTS, ANSWERS, scores, strict=True):
        expected = [alone(model, tiny_tokenizer, prompt, answer) for answer in answers]
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("way")
def test_candidates_of_a_single_token(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """An empty answer is its end-of-text token alone: nothing continues the cache."""
    prompts = ["#!#", "$ and more"]
    cases, _ = encode_cases(tiny_tokenizer, prompts, [[""], [""]], 64)
    scores = score_candidates(model, cases, tiny_tokenizer.pad_token_id)
    for prompt, found in zip(prompts, scores, strict=True):
        np.testing.assert_allclose(found, [alone(model, tiny_tokenizer, prompt, "")], atol=1e-4, rtol=0)


def test_a_prompt_is_cut_for_its_longest_candidate(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """One token a character: begin, four of the prompt, then 22 and the end, or room for the 20 that are generated."""
    whole, cut = "#!$#!$#!$", "#!$#!$#!$"[-4:]
    for longest, context in (("@" * 22, 28), ("@@@", 25)):
        cases, number = encode_cases(tiny_tokenizer, [whole, cut], [[longest, "?"]] * 2, context)
        assert number == 1
        found = score_candidates(model, cases, tiny_tokenizer.pad_token_id)
        expected = [alone(model, tiny_tokenizer, cut, answer) for answer in (longest, "?")]
        np.testing.assert_allclose(found, [expected] * 2, atol=1e-4, rtol=0)


def test_a_candidate_longer_than_the_context_is_named(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"candidate '(\?@){14}' does not fit 29 tokens: raise model\.context"):
        encode_cases(tiny_tokenizer, ["#"], [["?", "?@" * 14]], 29)
    assert encode_cases(tiny_tokenizer, ["#"], [["?", "?@" * 14]], 31)[1] == 0


class Watching(nn.Module):
    """Notes the tokens, the positions of the cache, and the logits of each pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module, self.passes = model, []

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, logits_to_keep=0, use_cache=True):
        output = self.module(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            use_cache=use_cache,
        )
        self.passes.append((input_ids.shape, output.logits.shape[1], attention_mask.numel()))
        return output


def test_each_prompt_is_read_once_and_no_batch_is_too_large(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model takes no trees."""
    monkeypatch.setattr(ranking, "why_no_trees", lambda *_: "it is told not to")
    watched = Watching(model)
    cases = encoded(tiny_tokenizer, repeated=3)
    score_candidates(watched, cases, tiny_tokenizer.pad_token_id, batch_tokens=600)
    reading, continuing = watched.passes[::2], watched.passes[1::2]
    assert sum(shape[0] for shape, _, _ in reading) == len(cases)
    assert {logits for _, logits, _ in reading} == {1}
    assert sum(shape[0] for shape, _, _ in continuing) == 3 * sum(map(len, ANSWERS))
    assert max(cached for _, _, cached in continuing) <= 600
    assert len(reading) > 1


@torch.no_grad()
def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, room: int, tokens: int) -> str:
    """The most probable token, again and again, from one whole sequence each time."""
    ids, written = encode_prompt(tokenizer, prompt, room), []
    for _ in range(tokens):
        following = int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax())
        if following == tokenizer.eos_token_id:
            break
        written.append(following)
    return tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_answers_are_those_of_each_row_alone(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    """Two prompts are cut to 44 tokens; the model's own settings, which would sample, do not count."""
    expected = [greedy(model, tiny_tokenizer, prompt, 44, 20) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    prompts = [case.prompt for case in encoded(tiny_tokenizer, 64)]
    model.generation_config.update(repetition_penalty=3.0, no_repeat_ngram_size=1)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for one in (model, adapted):
        assert generate_answers(one, tiny_tokenizer, prompts, 20, batch_size) == expected
        assert one.generation_config.repetition_penalty == 3.0
    model.generation_config = GenerationConfig()
    for prompt, text in zip(PROMPTS, expected, strict=True):
        ids = torch.tensor([encode_prompt(tiny_tokenizer, prompt, 44)])
        settings = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=0, pad_token_id=1)
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert tiny_tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == text


def test_an_answer_ends_at_the_end_of_text_token(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A model that always writes the end."""
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
        tiny_llama.model.norm.weight.fill_(1)
    assert tiny_tokenizer.eos_token_id == 0  # the first of equal logits
    prompts = [case.prompt for case in encoded(tiny_tokenizer)]
    assert generate_answers(tiny_llama, tiny_tokenizer, prompts, 20) == [""] * 4
