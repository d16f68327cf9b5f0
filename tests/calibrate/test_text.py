"""Drawing tokens."""

from __future__ import annotations

import torch

from mixedprec_plugin.calibrate.text import draw


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    likely = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    count = 200_000
    drawn = draw(likely.expand(count, -1), torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=len(likely)) / count
    # four standard errors of the likeliest
    assert float((found - likely).abs().max()) < 4 * (0.5 * 0.5 / count) ** 0.5
    assert not bool(found[likely == 0].any())
