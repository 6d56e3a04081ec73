"""Every PEFT type on every quantized base: trains through `Trainer`, saves, reloads, generates, merges."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_efficiency import merge_adapters
from tests.adapters import ADAPTERS
from tests.integrations.peft.conftest import logits, packed_layers, relative
from tests.methods import STORAGES

STEPS = 3


@pytest.fixture(scope="module")
def bases(load_base):
    """One loaded model a base, to be copied: deepcopy is faster than loading."""
    return {method: load_base(method) for method in STORAGES}


@pytest.fixture
def train(tmp_path, base_tokens):
    """Trains a PEFT model for three steps on one batch and returns the losses before each."""
    rows = [{"input_ids": row, "labels": row} for row in base_tokens.tolist()]

    def run(model, learning_rate):
        arguments = TrainingArguments(
            tmp_path / "trainer",
            max_steps=STEPS,
            per_device_train_batch_size=len(rows),
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return run


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("method", STORAGES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_type_on_base(kind, method, bases, base_tokens, train, tmp_path):
    row, base = ADAPTERS[kind], copy.deepcopy(bases[method])
    stored = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.manual_seed(0)
    model = get_peft_model(base, row.build())
    before = logits(model, base_tokens)
    losses = train(model, row.learning_rate)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]

    trained = logits(model, base_tokens)
    assert relative(trained, before) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(bases[method]), tmp_path / "adapter")
    assert torch.equal(logits(again, base_tokens), trained)
    with again.disable_adapter():
        assert torch.equal(logits(again, base_tokens), logits(bases[method], base_tokens))
    for name, tensor in again.get_base_model().state_dict().items():  # what is packed never changes
        plain = name.replace(".base_layer", "")
        assert plain not in stored or torch.equal(tensor, stored[plain])

    tokens = again.generate(input_ids=base_tokens[:, :5], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert tokens.shape == (len(base_tokens), 8)

    if row.merges:
        merged = merge_adapters(again)
        assert not packed_layers(merged)
        assert relative(logits(merged, base_tokens), trained) < 3e-6
    else:
        with pytest.raises(ValueError, match="merge"):
            merge_adapters(again)


def test_auto_class_finds_base_and_adapter(load_base, base_dir, base_tokens, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(load_base("nf4-double"), ADAPTERS["lora"].build(init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(base_dir("nf4-double"))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, base_tokens), logits(adapted, base_tokens))


@pytest.mark.parametrize("method", STORAGES)
def test_lora_through_the_sft_trainer(method, bases, tiny_tokenizer, texts, tmp_path):
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        max_length=24,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        copy.deepcopy(bases[method]),
        args=arguments,
        train_dataset=Dataset.from_list([{"text": text} for text in texts[:4]]),
        processing_class=tiny_tokenizer,
        peft_config=ADAPTERS["lora"].build(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    tokens = torch.arange(3, 27)[None]
    trained = logits(trainer.model, tokens)
    assert relative(logits(merge_adapters(trainer.model), tokens), trained) < 3e-6
