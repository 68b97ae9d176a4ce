"""The embedded language model: a small LLaMA with random weights and a byte-level BPE from the task's texts.

Architecture: Touvron et al., LLaMA, 2023 (initial weights N(0, 0.02); input and output embeddings are not tied).
Tokenizer: byte-level byte-pair encoding (Radford et al., GPT-2, 2019): any text has tokens, and no token is unknown.
The result is an ordinary Hugging Face folder, the same bytes for the same arguments and library versions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtailor.core.errors import ModelError
from fedtailor.core.seeding import seed_for
from fedtailor.core.settings import ModelConfig
from fedtailor.models.folder import save_folder

SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS = 0, 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""``<s><|user|>Name the capital.<|assistant|>Paris</s>``: three tokens beside the texts' own."""

ROOM = 1024
"""Tokens that an answer may add to a text of the task's full length."""


def build(texts: Iterable[str], cfg: ModelConfig, max_length: int, seed: int, out: Path) -> Path:
    """Writes config, fp32 ``model.safetensors`` and tokenizer to the folder ``out``, as a whole.

    Args:
        texts: the task's train texts, instructions and answers; their order does not matter.
        cfg: sizes; ``vocab_size`` is an upper bound, reached only if the texts are rich enough.
        max_length: most tokens of an example, special ones included.
        seed: run seed; the global random state is neither read nor changed.
        out: folder to make or replace.

    Raises:
        ModelError: no text has any character, a vocabulary too small for all bytes, or heads of odd width.
    """
    tokenizer = build_tokenizer(texts, cfg.vocab_size, max_length)
    config = llama_config(cfg, max_length, len(tokenizer))
    # The module constructors draw from torch's default generator; only the CPU's is touched, and restored.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, "model", "tiny-llama"))
        model = LlamaForCausalLM(config)
    save_folder(model, tokenizer, out)
    return out


def llama_config(cfg: ModelConfig, max_length: int, vocab_size: int) -> LlamaConfig:
    """The architecture that ``build`` makes, before any weight exists.

    Raises:
        ModelError: the heads' width is odd, and rotary positions turn pairs.
    """
    if cfg.hidden_size // cfg.heads % 2:
        raise ModelError(
            f"tiny-llama: 'model.hidden_size' / 'model.heads' = {cfg.hidden_size} / {cfg.heads} must be even"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        intermediate_size=cfg.intermediate_size,
        max_position_embeddings=max_length + ROOM,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def build_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learns the merges; ``<pad>`` is 0, ``<s>`` (put before every text) 1, ``</s>`` 2.

    The trainer breaks ties by ids that it gives in the order of the alphabet, so equal sets of texts give equal bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(SPECIAL) + len(alphabet)
    if vocab_size < least:
        raise ModelError(
            f"tiny-llama: 'model.vocab_size' ({vocab_size}) is below {least}: all bytes and special tokens"
        )
    learned = sorted(text for text in texts if text)
    if not learned:
        raise ModelError("tiny-llama: the task's train texts hold no characters to learn a vocabulary from")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
    )
    tokenizer.train_from_iterator(learned, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=max_length + ROOM,
        padding_side="right",
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        additional_special_tokens=list(SPECIAL[3:]),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made
