"""The nano mixture's tokenizer: one token a character (printable ASCII and newline), an end token, a padding token."""

from __future__ import annotations

import json
from pathlib import Path

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
SPECIAL = ("<pad>", "<eos>", "<unk>")
VOCAB = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
VOCAB_SIZE = len(VOCAB)


def encode(text: str) -> list[int]:
    """Token ids of ``text``; nothing is added."""
    return [VOCAB.get(character, UNKNOWN_ID) for character in text]


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer files that ``AutoTokenizer.from_pretrained(folder)`` reads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    config_file = Path(folder) / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    # transformers 5 writes its own class name, which earlier versions do not know.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
