"""A batch in pieces: every window once, in order; the terms of the pieces are those of the whole."""

from __future__ import annotations

import pytest
import torch

from moesurgeon.engine.batches import Batch, to_batch
from moesurgeon.engine.routing import Routing
from moesurgeon.recovery.estimator import Routed
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.share import Share
from moesurgeon.recovery.teacher import Said
from moesurgeon.recovery.terms import Heard, Terms, pieces_of, sums_of
from tests.engine.small import random_windows

ROUTING = Routing("softmax", True, 1.0, 1, 1, "max")
LOSSES = Losses(router=0.4, hidden=0.3, lm=0.2, z=0.1, balance=0.5, temperature=2.0)
EXPERTS, VOCABULARY, HIDDEN, LAYERS = 5, 11, 3, (1, 2)


def _batch() -> Batch:
    return to_batch(random_windows("a", count=7, vocabulary=VOCABULARY, shortest=2, longest=9), torch.device("cpu"))


@pytest.mark.parametrize(("tokens", "sizes"), [(None, [7]), (1000, [7]), (1, [1] * 7), (27, [3, 3, 1])])
def test_every_window_is_in_one_piece(tokens: int | None, sizes: list[int]) -> None:
    batch = _batch()
    assert batch.tokens.shape[1] == 8
    pieces = pieces_of(batch, tokens)
    assert [len(piece.windows) for piece in pieces] == sizes
    assert [id(window) for piece in pieces for window in piece.windows] == [id(window) for window in batch.windows]


def test_the_terms_of_pieces_add_up_to_those_of_the_batch() -> None:
    """Figures and what is added up, of made-up logits: whatever makes them, the sums are those of ``sums_of``."""
    batch = _batch()
    random = torch.Generator().manual_seed(0)
    rows, length = batch.tokens.shape

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(rows, length, *shape, generator=random)

    logits, teachers, hidden, theirs = made(VOCABULARY), made(VOCABULARY), made(3, HIDDEN), made(3, HIDDEN)
    routers, wanted = made(2, EXPERTS), made(2, EXPERTS)
    text = batch.is_text

    def routed(number: int, chosen: slice, width: int) -> Routed:
        part = routers[chosen, :width, number].flatten(0, 1)
        return Routed(part, part.topk(2).indices)

    whole = slice(0, rows)
    said = Said(
        logits=teachers,
        routers=[wanted[:, :, number][text] for number in range(2)],
        hidden=[theirs[:, :, number][text] for number in range(3)],
    )
    heard = Heard(
        logits, [routed(number, whole, length) for number in range(2)], [hidden[:, :, number] for number in range(3)]
    )
    expected = sums_of(LOSSES, ROUTING, heard, said, Share(batch), routers=True)

    pieces = pieces_of(batch, 27)
    terms = Terms(LOSSES, ROUTING, pieces, Share(batch))
    starts = [0, 3, 6]
    main, beside = torch.zeros(()), torch.zeros(())
    windows = [slice(start, start + len(piece.windows)) for start, piece in zip(starts, pieces, strict=True)]
    for number, (piece, mine) in enumerate(zip(pieces, windows, strict=True)):
        width = piece.tokens.shape[1]
        for place, layer in enumerate(LAYERS):
            terms.count(layer, number, routed(place, mine, width))
        for layer in range(3):
            wished = theirs[mine, :width, layer][piece.is_text]
            terms.see_hidden(layer, number, hidden[mine, :width, layer], wished)
        piece_said = Said(logits=teachers[mine, :width])
        main = main + terms.at_the_end(number, logits[mine, :width], piece_said)
    for number, (piece, mine) in enumerate(zip(pieces, windows, strict=True)):
        width = piece.tokens.shape[1]
        for place, layer in enumerate(LAYERS):
            given = wanted[mine, :width, place][piece.is_text]
            more, rest = terms.of_routers(layer, number, routed(place, mine, width), given)
            assert more is not None
            main, beside = main + more, beside + rest
        for layer in range(3):
            wished = theirs[mine, :width, layer][piece.is_text]
            main = main + terms.of_hidden(layer, number, hidden[mine, :width, layer], wished)
    torch.testing.assert_close(main, expected.main, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(beside, expected.beside, rtol=1e-5, atol=1e-6)
    figures = terms.complete()
    assert list(figures) == list(expected.figures)
    for name, value in expected.figures.items():
        assert figures[name] == pytest.approx(value, rel=1e-5), name
