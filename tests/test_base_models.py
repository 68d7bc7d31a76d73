"""A model is loaded with the weights of its files, all of them, or refused before it fills the memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    MambaConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import tiny
from rankwise.adapters import load_adapter_folder
from rankwise.errors import UserError
from rankwise.methods.listing import method_rows
from rankwise.models import (
    context_limit,
    load_classifier,
    load_language_model,
    load_sequence_model,
    load_tokenizer,
)
from rankwise.models.index import INDEX
from rankwise.schema import ModelSettings

LABELS = ["no", "yes"]


def decoder(folder: Path) -> Path:
    tiny.make("llama").save_pretrained(folder)
    return folder


def encoder(folder: Path) -> Path:
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def encoder_decoder(folder: Path) -> Path:
    config = T5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def asked(folder: Path) -> ModelSettings:
    return ModelSettings(path=str(folder))


def without(folder: Path, part: str) -> None:
    """Leave the weights out whose names have this part."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    left = {name: weight for name, weight in weights.items() if part not in name}
    assert len(left) < len(weights)
    save_file(left, path, metadata={"format": "pt"})


def changed(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_language_model_without_a_weight_is_refused(tmp_path: Path) -> None:
    """transformers would make it of random numbers and go on."""
    folder = decoder(tmp_path / "model")
    without(folder, "layers.1.mlp.up_proj")
    message = r"lack 1 of the weights of LlamaForCausalLM \(model.layers.1.mlp.up_proj.weight is the first\)"
    with pytest.raises(UserError, match=message):
        load_language_model(asked(folder))


def test_a_config_with_more_layers_than_the_files_is_refused(tmp_path: Path) -> None:
    folder = encoder_decoder(tmp_path / "model")
    load_sequence_model(asked(folder))
    changed(folder, num_decoder_layers=3)
    with pytest.raises(UserError, match=r"lack 13 of .* \(decoder.block.2.*give a whole checkpoint, of such a model"):
        load_sequence_model(asked(folder))


def test_a_classifier_brings_its_head_and_perhaps_its_pooler(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "model")
    assert load_classifier(asked(folder), LABELS, 0).num_labels == 2
    shutil.copytree(folder, tmp_path / "half")
    without(tmp_path / "half", "pooler.dense.weight")
    with pytest.raises(UserError, match=r"lack 1 of the weights .*\(bert.pooler.dense.weight is the first"):
        load_classifier(asked(tmp_path / "half"), LABELS, 0)
    without(folder, "pooler")
    load_classifier(asked(folder), LABELS, 0)
    without(folder, "encoder.layer.1.attention.self.query")
    with pytest.raises(UserError, match=r"lack 2 of the weights .*\(bert.encoder.layer.1.attention.self.query.w"):
        load_classifier(asked(folder), LABELS, 0)


def test_an_adapter_s_base_is_whole_too(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "model")
    tiny.adapted("llama").save_pretrained(tmp_path / "adapter")
    load_adapter_folder(tmp_path / "adapter", str(folder))
    without(folder, "model.norm")
    with pytest.raises(UserError, match=r"lack 1 of .* \(model.norm.weight is the first\)"):
        load_adapter_folder(tmp_path / "adapter", str(folder))


def test_a_weight_of_another_shape_is_refused_but_for_the_head_s(tmp_path: Path) -> None:
    """A classifier's labels are the task's; what is below is the files'."""
    folder = tmp_path / "model"
    tiny.make("bert").save_pretrained(folder)  # three labels
    assert load_classifier(asked(folder), LABELS, 0).num_labels == 2
    tiny.adapted("bert").save_pretrained(tmp_path / "adapter")
    load_adapter_folder(tmp_path / "adapter", str(folder))
    changed(folder, intermediate_size=40)
    message = r"bert.encoder.layer.0.intermediate.dense.bias has the shape \(24,\) in its files and \(40,\) by its"
    with pytest.raises(UserError, match=message):
        load_classifier(asked(folder), LABELS, 0)
    with pytest.raises(UserError, match=message):
        load_adapter_folder(tmp_path / "adapter", str(folder))


def test_layers_that_the_config_does_not_count_are_told(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "model")
    changed(folder, num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"9 weights of its files .* left out \(model.layers.1.input_layernorm.weight"):
        load_language_model(asked(folder))


def test_an_index_names_safetensors_alone(tmp_path: Path) -> None:
    """transformers would unpickle what else it names."""
    folder = decoder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "weights.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "weights.bin")}))
    with pytest.raises(UserError, match=r"index.json: 'weights.bin' is no safetensors file: save the model again"):
        load_language_model(asked(folder))


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size"])
def test_a_model_far_larger_than_its_files_is_refused(tmp_path: Path, name: str) -> None:
    """With one more layer than they have, its weights would be made and filled first."""
    folder = decoder(tmp_path / "model")
    changed(folder, **{name: 2**36, "num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"config.json describes a model of [\d,]+ weights, and its files have "):
        load_language_model(asked(folder))


@pytest.mark.parametrize("values", [{"num_hidden_layers": 10**9}, {"text_config": {"n_layers": 10**9}}])
def test_absurd_counts_are_refused_by_whatever_reads_the_config(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, values: dict[str, object]
) -> None:
    """transformers would make a list of a billion kinds of layers, for a tokenizer too."""
    folder = decoder(tmp_path / "model")
    changed(folder, **values)
    message = r"config.json: \w+layers 1000000000 is more than any model has \(1024\): fetch the file again"
    for read in (
        lambda: load_language_model(asked(folder)),
        lambda: load_tokenizer(str(folder)),
        lambda: context_limit(asked(folder), tiny_tokenizer),
        lambda: method_rows(str(folder)),
    ):
        with pytest.raises(UserError, match=message):
            read()


def test_a_billion_labels_are_refused(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "model")
    changed(folder, num_labels=10**9)
    with pytest.raises(UserError, match=r"num_labels 1000000000 is more than any model has"):
        load_classifier(asked(folder), LABELS, 0)


def test_a_config_may_count_other_things(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "long")
    labels = {"soccer player": 5000, "two layers": 5001}
    changed(tmp_path / "long", max_position_embeddings=10**7, num_experts=2**14, label2id=labels)
    load_language_model(asked(tmp_path / "long"))


@pytest.mark.parametrize(("dropout", "same"), [(None, False), (0.0, True), (0.5, False)])
def test_the_base_s_own_dropout_may_be_set(tmp_path: Path, dropout: float | None, same: bool) -> None:
    settings = ModelSettings(path=str(encoder(tmp_path / "bert")), dropout=dropout)
    model = load_classifier(settings, LABELS, 0).train()
    words = torch.arange(24).reshape(2, 12)
    assert torch.equal(model(words).logits, model(words).logits) == same
    shares = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert shares == {0.1 if dropout is None else dropout}
    assert model.config.hidden_dropout_prob == 0.1  # what is saved with the model


def test_a_model_without_dropout_has_none_to_set(tmp_path: Path) -> None:
    MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.dropout 0.0: the model's config.json has no dropout: leave it out"):
        load_language_model(ModelSettings(path=str(tmp_path), dropout=0.0))
