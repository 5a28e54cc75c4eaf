import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from intervale.core.errors import UserError
from intervale.model import families, layout
from intervale.model.checkpoint import INDEX
from intervale.model.convert import convert
from intervale.model.hf_files import LAYOUT
from intervale.model.load import load_network
from intervale.model.source import OFFICIAL_SIDE, build_network

TEXTS = {
    "internlm2": {
        "architectures": ["InternLM2ForCausalLM"],
        "bias": False,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "internlm2-bias-mha": {
        "architectures": ["InternLM2ForCausalLM"],
        "bias": True,
        "num_key_value_heads": 4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2},
    "llama": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, "vit6b": True},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "num_key_value_heads": 4, "pad_token_id": 0, "sliding_window": 31},
    "qwen2-tied": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "tie_word_embeddings": True},
}
IMAGE_TOKEN = 290


def write_official(folder: Path, kind: str, shards: int = 1) -> Path:
    """A tiny official folder of a family with every parameter random, in mixed types, in `shards` files."""
    llm = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    llm |= TEXTS[kind]
    big = llm.pop("vit6b", False)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    vision |= {"qkv_bias": not big, "qk_normalization": big, "norm_type": "rms_norm" if big else "layer_norm"}
    config = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "llm_config": llm, "vision_config": vision}
    config |= {"ps_version": "v2", "downsample_ratio": 0.5, "select_layer": -1, "force_image_size": 28, "template": "internlm2-chat"}
    native = families.native_config(config, IMAGE_TOKEN, kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in build_network(native).state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for number, move in enumerate(layout.plan_moves(shapes, families.backbone_of(config, kind)[1].style)):
        if native.tie_word_embeddings and move.natives == ("lm_head.weight",):
            continue
        dtype = torch.bfloat16 if number % 3 else torch.float32
        tensors[move.official] = (torch.randn(layout.official_shape(move, shapes), generator=generator) * 0.1).to(dtype)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('imported')")
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {name: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}))
    return folder


def stored(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    return {name: (file.name, tensor) for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", TEXTS)
def test_round_trip_keeps_every_tensor(tmp_path: Path, kind: str, shards: int) -> None:
    source = write_official(tmp_path / "src", kind, shards)
    convert(source, tmp_path / "hf", "hf", image_token_id=IMAGE_TOKEN)
    convert(tmp_path / "hf", tmp_path / "back", "official")
    before, after = stored(source), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(before[name][0] == after[name][0] and same(before[name][1], after[name][1]) for name in before)
    for name in ("config.json", "modeling_internvl_chat.py"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    if shards > 1:
        assert json.loads((source / INDEX).read_text())["weight_map"] == json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("kind", TEXTS)
@torch.no_grad()
def test_plain_transformers_opens_the_hf_folder_with_the_same_logits(tmp_path: Path, kind: str) -> None:
    source = write_official(tmp_path / "src", kind)
    convert(source, tmp_path / "hf", "hf", image_token_id=IMAGE_TOKEN)
    plain, report = InternVLForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.cat([torch.arange(3, 20), torch.tensor([IMAGE_TOKEN]), torch.arange(20, 40)])[None]
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    wanted = plain(input_ids=ids, pixel_values=pixels).logits
    for folder in (source, tmp_path / "hf"):
        network = load_network(folder, dtype=torch.float32, image_token_id=IMAGE_TOKEN)
        difference = (network(input_ids=ids, pixel_values=pixels).logits - wanted).abs().max()
        assert difference <= 1e-6 * wanted.abs().max()


def test_a_folder_without_its_official_side_becomes_official_all_the_same(tmp_path: Path) -> None:
    source = write_official(tmp_path / "src", "qwen2")
    convert(source, tmp_path / "hf", "hf", image_token_id=IMAGE_TOKEN)
    shutil.rmtree(tmp_path / "hf" / OFFICIAL_SIDE)
    convert(tmp_path / "hf", tmp_path / "back", "official", image_token_id=IMAGE_TOKEN)
    before, after = stored(source), stored(tmp_path / "back")
    assert all(same(before[name][1], after[name][1]) for name in before)


def test_the_hf_folder_says_what_servers_need(tmp_path: Path, tiny: Path) -> None:
    convert(tiny, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is False
    assert config["image_token_id"] == json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]["vocab"]["<IMG_CONTEXT>"]
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 56, "width": 56}
    assert (processor["crop_to_patches"], processor["max_patches"]) == (True, 4)
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
    names = set(load_file(tmp_path / "hf" / "model.safetensors"))
    assert "language_model.model.embed_tokens.weight" in names
    assert all(name.startswith(("language_model.", "vision_tower.", "multi_modal_projector.")) for name in names)


def test_the_chat_template_renders_the_official_prompt(tmp_path: Path, tiny: Path) -> None:
    from transformers import AutoTokenizer

    from intervale.data.prompt import Picture, Turn, encode_turns
    from intervale.model.load import text_side

    convert(tiny, tmp_path / "hf", "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    side = text_side(tiny)
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "哪个辣? it's {{x}}\n"}]},
        {"role": "assistant", "content": "第一个"},
        {"role": "user", "content": " why?"},
    ]
    turns = [
        Turn("user", (Picture(1), "\n", Picture(1), "\n哪个辣? it's {{x}}\n")),
        Turn("assistant", ("第一个",)),
        Turn("user", (" why?",)),
    ]
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    expanded = text.replace("<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>")
    ours = encode_turns(turns, side.template, side.tokenizer, answer_next=True).ids_S.tolist()
    assert theirs(expanded, add_special_tokens=False).input_ids == ours
    assert theirs("x").input_ids[0] == theirs.bos_token_id
    system = theirs.apply_chat_template([{"role": "system", "content": "S"}, {"role": "user", "content": "q"}], tokenize=False)
    assert system == "<s><|im_start|>system\nS<|im_end|><|im_start|>user\nq<|im_end|>"


def edit_weights(folder: Path, change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.attention.wqkv.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors["language_model.extra.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 32)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"), [("missing", "wqkv"), ("unknown", "language_model.extra.weight"), ("misshapen", "wqkv.weight [3, 32]")]
)
@pytest.mark.parametrize("to", ["hf", "official"])
def test_a_tensor_that_does_not_fit_stops_everything_by_name(tmp_path: Path, change: str, named: str, to: str) -> None:
    source = write_official(tmp_path / "src", "internlm2")
    edit_weights(source, change)
    with pytest.raises(UserError, match=f"1 {change}") as caught:
        convert(source, tmp_path / "dst", to, image_token_id=IMAGE_TOKEN)
    assert named in caught.value.what
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("ps_version", "v1", "ps_version"),
        ("pad2square", True, "pad2square"),
        ("use_llm_lora", 16, "merge"),
        ("llm_config", {"architectures": ["GPTX"]}, "GPTX"),
    ],
)
def test_unsupported_settings_are_refused_by_name(tmp_path: Path, key: str, value: object, why: str) -> None:
    source = write_official(tmp_path / "src", "internlm2")
    config = json.loads((source / "config.json").read_text()) | {key: value}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=why):
        load_network(source, image_token_id=IMAGE_TOKEN)


class Bomb:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path("/tmp/intervale-pickle-ran").write_text, ("x",))


def test_a_pickle_is_never_opened_under_any_name(tmp_path: Path) -> None:
    source = write_official(tmp_path / "src", "internlm2")
    data = pickle.dumps(Bomb())
    (source / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_network(source, image_token_id=IMAGE_TOKEN)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\)") as caught:
        load_network(source, image_token_id=IMAGE_TOKEN)
    assert "safetensors" in caught.value.fix
    assert not Path("/tmp/intervale-pickle-ran").exists()


def test_a_truncated_file_and_an_index_that_leaves_the_folder_are_named(tmp_path: Path) -> None:
    source = write_official(tmp_path / "src", "internlm2")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable"):
        load_network(source, image_token_id=IMAGE_TOKEN)
    (source / INDEX).write_text(json.dumps({"weight_map": {"a": "../evil.safetensors"}}))
    with pytest.raises(UserError, match="points out of the folder"):
        load_network(source, image_token_id=IMAGE_TOKEN)


def test_hostile_code_beside_the_weights_is_never_imported(tmp_path: Path, tiny: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(tiny, folder)
    sentinel = tmp_path / "ran"
    code = f"open({str(sentinel)!r}, 'w').write('x')\nraise SystemExit\n"
    maps = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", None], "AutoModelForCausalLM": "evil.M"}
    for name in ("evil.py", "tokenization_evil.py", "configuration_internvl_chat.py", "modeling_internvl_chat.py", "__init__.py"):
        (folder / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        raw = json.loads((folder / name).read_text()) | {"auto_map": maps}
        if name == "config.json":
            raw["llm_config"]["auto_map"] = maps
        (folder / name).write_text(json.dumps(raw))
    from intervale.model.load import load_model

    load_model(folder)
    convert(folder, tmp_path / "hf", "hf")
    load_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "off", "official")
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["/tmp/intervale-pwned.safetensors", "../../pwned.safetensors", "x.bin", 3, None])
def test_a_file_name_from_a_folder_cannot_lead_out_of_the_target(tmp_path: Path, name: object) -> None:
    convert(write_official(tmp_path / "src", "internlm2"), tmp_path / "hf", "hf", image_token_id=IMAGE_TOKEN)
    layout_file = tmp_path / "hf" / OFFICIAL_SIDE / LAYOUT
    shards = json.loads(layout_file.read_text())["shards"]
    layout_file.write_text(json.dumps({"shards": dict.fromkeys(shards, name)}))
    with pytest.raises(UserError, match="not the name of a weight file"):
        convert(tmp_path / "hf", tmp_path / "out", "official")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "src"]
    assert not Path("/tmp/intervale-pwned.safetensors").exists()


def test_side_files_and_folders_come_back(tmp_path: Path) -> None:
    source = write_official(tmp_path / "src", "internlm2")
    (source / "examples").mkdir()
    for name in ("examples/a.txt", ".gitattributes", "layout.json", "README.md"):
        (source / name).write_text(name)
    convert(source, tmp_path / "hf", "hf", image_token_id=IMAGE_TOKEN)
    convert(tmp_path / "hf", tmp_path / "back", "official")
    before, after = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (source, tmp_path / "back"))
    assert before == after


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"force_image_size": "28"}, "force_image_size is '28'"),
        ({"max_dynamic_patch": 100000, "dynamic_image_size": True}, "limit of 128"),
        ({"select_layer": -9}, "select_layer -9"),
        ({"vision_config": None}, "vision_config|NoneType"),
        ({"template": ["a"]}, "template"),
    ],
)
def test_a_broken_config_is_named_never_a_traceback(tmp_path: Path, tiny: Path, change: dict[str, object], why: str) -> None:
    from intervale.model.load import load_model

    shutil.copytree(tiny, tmp_path / "m")
    config = json.loads((tiny / "config.json").read_text()) | change
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=why):
        load_model(tmp_path / "m", device="cpu")


def test_without_a_tokenizer_the_image_token_must_be_given(tmp_path: Path) -> None:
    source = write_official(tmp_path / "src", "internlm2")
    with pytest.raises(UserError, match="--image-token-id") as caught:
        convert(source, tmp_path / "hf", "hf")
    assert "IMG_CONTEXT" in caught.value.what


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_official(tmp_path / "src", "internlm2")

    def full(tensors: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("intervale.model.convert.save_file", full)
    with pytest.raises(UserError, match="disk is full"):
        convert(source, tmp_path / "hf", "hf", image_token_id=IMAGE_TOKEN)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
