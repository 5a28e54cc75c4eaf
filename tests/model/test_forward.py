"""Pictures among words: what stands where, and what learns from it. Legend: B rows, S positions, D width."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intervale.model.forward import embed

PICTURE, WIDTH = 3, 8
IDS_BS = torch.tensor([[0, 3, 3, 1, 0], [3, 2, 3, 3, 3], [1, 2, 0, 4, 1]])  # six picture tokens, one row without any


def network(learns: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.nn.Embedding]:
    torch.manual_seed(0)
    words = torch.nn.Embedding(5, WIDTH, dtype=dtype).requires_grad_(learns)
    return SimpleNamespace(get_input_embeddings=lambda: words), words


@pytest.mark.parametrize("known", [False, True], ids=["places looked for", "places known"])
@pytest.mark.parametrize("rows", [slice(None), slice(0, 1)], ids=["three rows", "one row"])
def test_pictures_stand_in_their_places_and_gradients_reach_them_and_the_words(rows: slice, known: bool) -> None:
    ids_BS = IDS_BS[rows]
    seen_BS = ids_BS == PICTURE
    model, words = network()
    features = torch.randn(int(seen_BS.sum()) // 2, 2, WIDTH, requires_grad=True)
    asked_BSD = torch.randn(*ids_BS.shape, WIDTH)
    found_BSD = embed(model, ids_BS, features, PICTURE, seen_BS.flatten().nonzero()[:, 0] if known else None)
    got = torch.autograd.grad((found_BSD * asked_BSD).sum(), (features, words.weight))
    expected_BSD = words(ids_BS).masked_scatter(seen_BS[..., None], features)
    wanted = torch.autograd.grad((expected_BSD * asked_BSD).sum(), (features, words.weight))
    assert torch.equal(found_BSD, expected_BSD)
    assert all(map(torch.equal, got, wanted))
    assert not got[1][PICTURE].any(), "the picture token's own embedding is not read"


@pytest.mark.parametrize(("of_words", "of_features"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_features_take_the_type_of_the_words(of_words: torch.dtype, of_features: torch.dtype) -> None:
    model, _ = network(learns=False, dtype=of_words)
    features = torch.randn(3, 2, WIDTH, dtype=of_features, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found_BSD = embed(model, IDS_BS, features, PICTURE)
    assert found_BSD.dtype == of_words
    assert torch.equal(found_BSD[IDS_BS == PICTURE], features.flatten(0, 1).to(of_words))
    found_BSD.sum().backward()
    assert features.grad is not None
    assert features.grad.dtype == of_features
    assert torch.equal(features.grad, torch.ones_like(features))


def test_text_alone_is_its_embeddings_and_a_count_that_is_wrong_is_refused() -> None:
    model, words = network()
    assert torch.equal(embed(model, IDS_BS[2:], None, PICTURE), words(IDS_BS[2:]))
    for features in (None, torch.randn(2, 2, WIDTH)):
        with pytest.raises(AssertionError, match="6 picture tokens"):
            embed(model, IDS_BS, features, PICTURE)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 3)], ids=["pictures", "text alone"])
def test_what_is_returned_is_no_view(learns: bool, rows: slice) -> None:
    """As no layer's output is one: for a view torch would compile the first layer apart."""
    model, _ = network(learns)
    count = int((IDS_BS[rows] == PICTURE).sum()) // 2
    features = torch.randn(count, 2, WIDTH, requires_grad=True) if count else None
    assert not embed(model, IDS_BS[rows], features, PICTURE)._is_view()
