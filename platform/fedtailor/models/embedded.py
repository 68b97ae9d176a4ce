"""The embedded models: a small BERT and a small LLaMA with random weights and a tokenizer from the task's texts.

BERT: Devlin et al., NAACL 2019 (dropout 0.1, initial weights N(0, 0.02)), with a WordPiece vocabulary. LLaMA: Touvron
et al., 2023 (initial weights N(0, 0.02); input and output embeddings are not tied), with byte-level byte-pair encoding
(Radford et al., GPT-2, 2019): any text has tokens, and no token is unknown.

The results are ordinary Hugging Face folders, the same bytes for the same arguments and library versions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from fedtailor.core.errors import ModelError
from fedtailor.core.seeding import seed_for
from fedtailor.core.settings import ModelConfig
from fedtailor.models.load import SPAN_ENDS, save_folder
from fedtailor.models.source import EMBEDDED_CAUSAL, EMBEDDED_LINEAR
from fedtailor.tasks.source import TaskKind

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PRIVATE_USE = 0xF0000
LLAMA_SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
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


def build_embedded(
    texts: Iterable[str], labels: Sequence[str], cfg: ModelConfig, max_length: int, seed: int, out: Path,
    kind: TaskKind = "classification",
) -> Path:  # fmt: skip
    """Writes config, fp32 ``model.safetensors`` and tokenizer to the folder ``out``, as a whole.

    Args:
        texts: the task's train texts, of instructions the answers too; their order does not matter.
        labels: class names in the order of their ids; only of classification.
        cfg: name and sizes; ``vocab_size`` is an upper bound, reached only if the texts are rich enough.
        max_length: most tokens of a text or example, special ones included.
        seed: run seed; the global random state is neither read nor changed.
        out: folder to make or replace.
        kind: of the task: ``tiny-bert`` classifies or marks spans.

    Raises:
        ModelError: no text has any character; of ``tiny-bert`` there are no labels; of ``tiny-llama`` the vocabulary is
            too small for all bytes, or the heads' width is odd.
    """
    from transformers import BertForQuestionAnswering, BertForSequenceClassification, LlamaForCausalLM

    causal = cfg.name == EMBEDDED_CAUSAL
    labels = SPAN_ENDS if kind == "extraction" else labels
    if not causal and not labels:
        raise ModelError("tiny-bert: the task has no labels")
    bert = BertForQuestionAnswering if kind == "extraction" else BertForSequenceClassification
    tokenizer = (build_byte_pairs if causal else build_wordpiece)(texts, cfg.vocab_size, max_length)
    config = embedded_config(cfg, max_length, len(tokenizer), labels)
    model = drawn(LlamaForCausalLM if causal else bert, config, seed, "model", cfg.name)
    save_folder(model, tokenizer, out)
    return out


def drawn(make: Any, config: PretrainedConfig, seed: int, *purpose: str) -> Any:
    """A model with weights from the seed alone; the global random state is neither read nor changed.

    Args:
        make: transformers' class.
        config: sizes.
        seed: run seed.
        purpose: names the random stream.
    """
    # The module constructors draw from torch's default generator; only the CPU's is touched, and restored.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, *purpose))
        return make(config)


def embedded_config(cfg: ModelConfig, max_length: int, vocab_size: int, labels: Sequence[str] = ()) -> PretrainedConfig:
    """The architecture that `build_embedded` makes, before any weight exists; arguments as there.

    Raises:
        ModelError: the width of ``tiny-llama``'s heads is odd, and rotary positions turn pairs.
    """
    from transformers import BertConfig, LlamaConfig

    if cfg.name == EMBEDDED_LINEAR:
        from fedtailor.models.linear import LinearConfig

        return LinearConfig(vocab_size=vocab_size)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": cfg.hidden_size, "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads, "intermediate_size": cfg.intermediate_size,
    }  # fmt: skip
    if cfg.name != EMBEDDED_CAUSAL:
        return BertConfig(
            **sizes,
            max_position_embeddings=max_length,
            pad_token_id=BERT_SPECIAL.index("[PAD]"),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    if cfg.hidden_size // cfg.heads % 2:
        raise ModelError(
            f"tiny-llama: 'model.hidden_size' / 'model.heads' = {cfg.hidden_size} / {cfg.heads} must be even"
        )
    return LlamaConfig(
        **sizes,
        max_position_embeddings=max_length + ROOM,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def build_linear(texts: Iterable[str], out: Path) -> Path:
    """Writes ``linear`` with W = 0, its tables and its tokenizer to the folder ``out``, as a whole.

    Args:
        texts: all texts of a regression task, train and test: "inputs | wanted outputs", as numbers.
        out: folder to make or replace.

    Raises:
        ModelError: rows of different sizes.
    """
    from fedtailor.models.linear import LinearConfig, LinearRegressor

    known = list(dict.fromkeys(texts))
    x, y = ([[float(word) for word in text.split("|")[side].split()] for text in known] for side in (0, 1))
    sizes = {(len(a), len(b)) for a, b in zip(x, y, strict=True)}
    if len(sizes) != 1:
        raise ModelError(f"linear: rows have {sorted(sizes)} inputs and outputs; one size is allowed")
    [(inputs, outputs)] = sizes
    words = ["[PAD]", *(f"[UNIT{i}]" for i in range(inputs)), *known]
    model = LinearRegressor(LinearConfig(inputs, outputs, len(words)))
    with torch.no_grad():
        model.body.linear.weight.zero_()
        model.body.rows.weight.copy_(torch.tensor([[0.0] * inputs, *torch.eye(inputs).tolist(), *x]))
        model.wanted.weight.copy_(torch.tensor([[0.0] * outputs] * (1 + inputs) + y))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[PAD]"))
    save_folder(
        model,
        PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizer, pad_token="[PAD]", model_input_names=["input_ids", "attention_mask"]
        ),
        out,
    )
    return out


def build_wordpiece(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learns a cased WordPiece vocabulary: NFC, accents kept, any script; [PAD] is 0.

    Every character that fits in half of the vocabulary, the frequent ones first, is a token of its own.
    """
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.BertNormalizer(strip_accents=False, lowercase=False)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    if not words:
        raise ModelError("tiny-bert: the task's train texts hold no characters to learn a vocabulary from")
    vocabulary = _learn(words, vocab_size)
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name[1:-1].lower()}_token": name for name in BERT_SPECIAL},
    )


def _learn(words: Counter[str], vocab_size: int) -> dict[str, int]:
    """WordPiece by merging the most frequent pairs, with ids that are the same in every process.

    ``tokenizers``' own WordPieceTrainer numbers the ``##`` characters in the order of a hash map that is
    seeded per process, and breaks ties by these numbers. Its BpeTrainer is deterministic, so each character
    is replaced by one of two private-use characters: even at the start of a word, odd (``##``) inside it.
    """
    # Characters that only occur alone (Han ideographs) need no form for the inside of a word.
    inner = {char for word in words if len(word) > 1 for char in word}
    alphabet = _alphabet(words, inner, vocab_size // 2)
    start = {char: chr(_PRIVATE_USE + 2 * i) for i, char in enumerate(alphabet)}
    inside = {char: chr(_PRIVATE_USE + 2 * i + 1) for i, char in enumerate(alphabet) if char in inner}

    # A word with a character outside the alphabet is [UNK] whatever is learned: it teaches nothing.
    coded = {w: start[w[0]] + "".join(inside[c] for c in w[1:]) for w in sorted(words) if start.keys() >= set(w)}
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(BERT_SPECIAL),
        initial_alphabet=[*start.values(), *inside.values()],
    )
    learner.train_from_iterator((" ".join([code] * words[word]) for word, code in coded.items()), trainer)

    def piece(token: str) -> str:
        numbers = [ord(char) - _PRIVATE_USE for char in token]
        return ("##" if numbers[0] % 2 else "") + "".join(alphabet[n // 2] for n in numbers)

    ids = learner.get_vocab()
    return {token if token in BERT_SPECIAL else piece(token): ids[token] for token in sorted(ids, key=ids.__getitem__)}


def _alphabet(words: Counter[str], inner: set[str], most: int) -> list[str]:
    """The most frequent characters whose one or two forms fit into ``most`` tokens, by code point."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            counts[char] += count
    ranked = sorted(counts, key=lambda char: (-counts[char], char))
    forms = accumulate(2 if char in inner else 1 for char in ranked)
    return sorted(char for char, total in zip(ranked, forms, strict=True) if total <= most)


def build_byte_pairs(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learns the merges; ``<pad>`` is 0, ``<s>`` (put before every text) 1, ``</s>`` 2.

    The trainer breaks ties by ids that it gives in the order of the alphabet, so equal sets of texts give equal bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(LLAMA_SPECIAL) + len(alphabet)
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
        vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=list(LLAMA_SPECIAL),
        initial_alphabet=alphabet,
    )  # fmt: skip
    tokenizer.train_from_iterator(learned, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=max_length + ROOM,
        padding_side="right",
        pad_token=LLAMA_SPECIAL[PAD],
        bos_token=LLAMA_SPECIAL[BOS],
        eos_token=LLAMA_SPECIAL[EOS],
        additional_special_tokens=list(LLAMA_SPECIAL[3:]),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made
