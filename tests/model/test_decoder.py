"""The walk over the layers is transformers' own forward: whole, in parts, with joint projections, compiled and recomputed."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor
from transformers import AttentionInterface, AutoConfig, AutoModel

from intervale.data.packing import Group
from intervale.model import decoder
from intervale.model.attention import NAME, Layout, layout_of, packed_attention
from intervale.model.decoder import Walk, hidden_at_targets
from intervale.model.forward import embed

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
FAMILIES = ["llama", "qwen2", "qwen3", "phi3"]


def text_model(family: str) -> Any:
    """A small random text model of a family, as the language model of a network."""
    AttentionInterface.register(NAME, packed_attention)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, pad_token_id=0)
    text = AutoModel.from_config(config).train()
    return SimpleNamespace(model=SimpleNamespace(language_model=text)), text


def pack_of(groups: list[Group]) -> tuple[Layout, torch.Tensor]:
    begins = [group.common for group in groups for _ in range(group.rows)]
    rows = [torch.cat([torch.arange(g.common)] + [g.common + torch.arange(g.branch)] * g.branches) for g in groups for _ in range(g.rows)]
    positions_T = torch.cat(rows)
    return layout_of(groups, begins, positions_T).to(torch.device("cpu")), positions_T


def walked(network: Any, text: Any, groups: list[Group], walk: Walk) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states at every third token, gradient of the embeddings)."""
    layout, positions_T = pack_of(groups)
    text.set_attn_implementation(NAME)
    embedded = torch.randn(1, len(positions_T), SIZES["hidden_size"], generator=torch.Generator().manual_seed(1)).requires_grad_()
    hidden = hidden_at_targets(network, embedded, positions_T[None], layout, torch.arange(0, len(positions_T), 3), walk)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    assert embedded.grad is not None
    return hidden.detach(), embedded.grad


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_alone_gives_what_transformers_gives(family: str) -> None:
    network, text = text_model(family)
    hidden, _ = walked(network, text, [Group(1, 20)], Walk())
    text.set_attn_implementation("sdpa")
    embedded = torch.randn(1, 20, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    wanted = text(inputs_embeds=embedded).last_hidden_state[0, ::3]
    assert torch.allclose(hidden, wanted, atol=1e-5)


class OneByOne(torch.nn.Module):
    """What `fast_lora.Together` gives, by the layers themselves."""

    def __init__(self, layers: list[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_joint_projections_are_the_layers_own(family: str) -> None:
    network, text = text_model(family)
    groups = [Group(2, 9), Group(1, 6, 2, 3)]
    apart = walked(network, text, groups, Walk())
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.together = OneByOne([attention.q_proj, attention.k_proj, attention.v_proj])
        mlp.together = OneByOne([mlp.gate_proj, mlp.up_proj])
    for one, other in zip(apart, walked(network, text, groups, Walk()), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_are_plain_ones_in_few_graphs(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """One piece of code for all layers and all lengths of plain packs, and a few more for packs of several groups."""
    network, text = text_model("llama")
    monkeypatch.setattr(decoder, "_compiled", functools.cache(lambda part: torch.compile(part, dynamic=True, backend="aot_eager")))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = [[Group(2, 30)], [Group(3, 31)], [Group(4, 17)]]
    mixed = [[Group(2, 20), Group(2, 12)], [Group(3, 22), Group(2, 9)], [Group(4, 24), Group(3, 8)]]
    counts = []
    for groups in plain + mixed:
        expected, found = (walked(network, text, groups, Walk(compiled, recompute)) for compiled in (False, True))
        for one, other in zip(expected, found, strict=True):
            assert torch.allclose(one, other, atol=1e-6)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[: len(plain)] == [1] * len(plain)
    assert counts[-1] == counts[-2]


def test_the_first_layer_is_compiled_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings with pictures among them look to the compiler as what a layer gives: a view of another tensor would not."""
    network, text = text_model("llama")
    text.set_attn_implementation(NAME)
    words = torch.nn.Embedding(SIZES["vocab_size"], SIZES["hidden_size"]).requires_grad_(False)
    network.get_input_embeddings = lambda: words
    monkeypatch.setattr(decoder, "_compiled", functools.cache(lambda part: torch.compile(part, dynamic=True, backend="eager")))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layout, positions_T = pack_of([Group(2, 30)])
    ids_1T = torch.arange(60)[None] % 7  # 0: a place of a picture
    features = torch.randn(3, 3, SIZES["hidden_size"], requires_grad=True)
    embedded = embed(network, ids_1T, features, 0, (ids_1T[0] == 0).nonzero()[:, 0])
    assert torch.equal(embedded[0, 7], features[0, 1])
    assert torch.equal(embedded[0, 8], words.weight[1])
    hidden_at_targets(network, embedded, positions_T[None], layout, torch.arange(9), Walk(compiled=True)).sum().backward()
    assert features.grad is not None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_joint_projections_keep_the_attentions_own_dropout() -> None:
    network, text = text_model("llama")
    for layer in text.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(3)
    apart = walked(network, text, [Group(2, 9)], Walk())
    for layer in text.layers:
        attention = layer.self_attn
        attention.together = OneByOne([attention.q_proj, attention.k_proj, attention.v_proj])
    torch.manual_seed(3)
    for one, other in zip(apart, walked(network, text, [Group(2, 9)], Walk()), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(("asked", "started"), [(1, 1), (4, 4), (32, 8)])
def test_no_more_compilers_are_started_than_torch_was_told(asked: int, started: int) -> None:
    with inductor.patch(compile_threads=asked):
        decoder._few_compilers()
        assert inductor.compile_threads == started


def dynamic_text(context: int) -> Any:
    """A text model whose rotary embedding is scaled beyond `context` positions."""
    config = AutoConfig.for_model("llama", **SIZES, pad_token_id=0, max_position_embeddings=context)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return AutoModel.from_config(config)


@pytest.mark.parametrize("groups", [[Group(2, 20)], [Group(1, 8, 2, 6), Group(2, 16)]])
def test_a_dynamic_rotary_embedding_asks_the_device_nothing_where_rows_are_short(groups: list[Group]) -> None:
    """The meta device has no answer."""
    layout, positions_T = pack_of(groups)
    embedded = torch.zeros(1, len(positions_T), SIZES["hidden_size"])
    text = dynamic_text(20)
    want = text.rotary_emb(embedded, position_ids=positions_T[None])
    got = decoder.rotary_of(text, embedded, positions_T[None], layout)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    away = decoder.rotary_of(text.to("meta"), embedded.to("meta"), positions_T[None].to("meta"), layout)
    assert [one.shape for one in away] == [one.shape for one in want]


def test_a_dynamic_rotary_embedding_is_scaled_where_a_row_is_long_and_back_again() -> None:
    text = dynamic_text(20)
    for rows in (20, 21, 30, 12, 20):
        layout, positions_T = pack_of([Group(1, rows)])
        embedded = torch.zeros(1, rows, SIZES["hidden_size"])
        want = dynamic_text(20).rotary_emb(embedded, position_ids=positions_T[None])
        got = decoder.rotary_of(text, embedded, positions_T[None], layout)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True)), rows
