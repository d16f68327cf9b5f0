"""Drawing tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mixedprec_plugin.calibrate.text import draw, starts


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    likely = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    count = 200_000
    drawn = draw(likely.expand(count, -1), torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=len(likely)) / count
    # four standard errors of the likeliest
    assert float((found - likely).abs().max()) < 4 * (0.5 * 0.5 / count) ** 0.5
    assert not bool(found[likely == 0].any())


def tokenizer(special: Sequence[str], *, begins: bool = False) -> PreTrainedTokenizerFast:
    """Of words: `</s>` is one of them, as an HTML tag is in Gemma's."""
    words = ("</s>", "a", "<bos>", "<|endoftext|>", "<eos>")
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(text) for text in special])
    if begins:
        made.post_processor = processors.TemplateProcessing(
            "<bos> $A", special_tokens=[("<bos>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize(
    ("special", "begins", "expected"),
    [
        (["<bos>", "<|endoftext|>", "<eos>"], False, [2, 3]),
        (["<bos>", "<eos>"], False, [2, 4]),
        # a text of a model that begins all alike is written from that alone
        (["<bos>", "<|endoftext|>", "<eos>"], True, [2]),
    ],
)
def test_text_begins_as_the_model_expects(
    special: Sequence[str], begins: bool, expected: list[int]
) -> None:
    assert starts(tokenizer(special, begins=begins)) == expected
