"""Instructions and tokenizers to test prompt templates with. Imports nothing of fedtailor: scripts use it too."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts texts into words before it looks up tokens: newlines stay together whatever follows them."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


class Case(NamedTuple):
    instruction: str
    response: str


CASES = [
    Case("Name a river.", "The Nile."),
    Case("How many days has a week?", "7"),
    Case("Übersetze: Guten Tag", "Bonjour à tous"),
    Case("Как называется месяц?", "Январь, февраль и март."),
    Case("什么是水？", "水是一种液体。"),
    Case("ما هو اليوم؟", "اليوم هو الاثنين"),
    Case("తెలుగులో చెప్పు", "నమస్కారం అండి"),
    Case("Send a smile", "😀👍🏽 done 👩‍👩‍👧"),
    Case("List three\n\nfruits", "- apple\n- pear\n\n- plum\n"),
    Case("Summarise.\n\nThe week has seven days.", "Seven days."),
    Case("Code, please", "def f(x):\n    return x\n"),
    Case("Blanks?  ", "a  b   c"),
    Case("Explain {instruction} and {response}", "They are {slots}: {0} {}"),
    Case("Punctuation", "...!? (\"x\") 'y' — z"),
    Case("Short", "a"),
    Case("The word", "Response: 1"),
]
"""Every fast tokenizer keeps prompt and response of these apart, so that joint text has the same tokens."""
ODD = {
    "marker in the response": Case("Explain the format", "It says ### Response: and then\n### Response: again"),
    "marker in the instruction": Case("What follows ### Response: here?", "An answer."),
    "response begins with a newline": Case("Begin below", "\nbelow"),
    "response begins with two newlines": Case("Begin far below", "\n\nfar below"),
    "response begins with blanks": Case("Indent", "   indented"),
    "special tokens named in the data": Case(
        "What is </s> or <s>?", "The names </s> and <|eot_id|> end and <s> begins."
    ),
}
"""What searching for markers, or encoding both parts at once, gets wrong or may get wrong."""


def _merges(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary that joins each word from its left, made without training: the same in any version."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    return vocabulary, list(merges)


def _llama3_words() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _words() -> list[str]:
    splitter = _llama3_words()
    texts = [text for case in CASES for text in case]
    texts += ["### Instruction:\n", "### Response: a"]
    found = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    return [*sorted(found), "ĊĊĊĊ", "ĠĠĠ"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 3's: byte-level BPE, a BOS before every text, header tokens, a chat template (ChatML)."""
    model = Tokenizer(models.BPE(*_merges(_words())))
    model.pre_tokenizer, model.decoder = _llama3_words(), decoders.ByteLevel()
    model.add_special_tokens(["<pad>", "<s>", "</s>", *HEADERS])
    bos = model.token_to_id("<s>")
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=HEADERS,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    return tokenizer


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2's: pieces of words that begin with a blank, one of which is put before every text."""
    texts = [text for case in CASES for text in case]
    words = sorted(
        {"▁" + word for text in [*texts, "### Instruction: Response: Below [INST]"] for word in text.split()}
    )
    chars = sorted({char for text in [*texts, *map(chr, range(33, 127))] for char in text} | {"▁", "\n"})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁▁▁", -6.0), ("▁▁", -5.0)]
    pieces += [(char, -9.0) for char in chars] + [(word, -4.0) for word in words if word not in chars]
    model = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    model.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = LLAMA2
    return tokenizer


def gpt2_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """GPT-2's own vocabulary, with a PAD, header tokens and a chat template. It uses no BOS."""
    folder = data / "tokenizers" / "gpt2"
    vocabulary = json.loads(gzip.decompress((folder / "encoder.json.gz").read_bytes()))
    lines = gzip.decompress((folder / "vocab.bpe.gz").read_bytes()).decode().split("\n")[1:]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
    model = Tokenizer(models.BPE(vocabulary, merges))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=end, eos_token=end, unk_token=end, clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": HEADERS})
    tokenizer.chat_template = CHATML
    return tokenizer


def dolly(data: Path, count: int = 200) -> list[Case]:
    """Every 75th row of databricks-dolly-15k that has a response, the context below the instruction."""
    lines = gzip.decompress((data / "dolly" / "databricks-dolly-15k.jsonl.gz").read_bytes()).decode().split("\n")
    cases = []
    for line in lines[::75]:
        row = json.loads(line) if line else {"response": ""}
        if row["response"].strip():
            text = row["instruction"] + ("\n\n" + row["context"] if row["context"].strip() else "")
            cases.append(Case(text, row["response"]))
    assert len(cases) >= count
    return cases[:count]
