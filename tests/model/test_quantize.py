"""A 4-bit base under LoRA: only the layers are rounded, training goes on and resumes bit by bit, export merges into the full base."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from intervale.core.config import load_recipe
from intervale.core.errors import UserError
from intervale.export.export import export
from intervale.model.load import load_network
from intervale.model.quantize import is_quantised_later, need_bitsandbytes, quantize_layers
from intervale.train.loop import train
from intervale.train.recipe import TrainRecipe


def write_recipe(folder: Path, model: Path, data: Path) -> Path:
    text = (
        f"model: {model}\nout: {folder / 'run'}\ndata: {{train: {data / 'train.jsonl'}, eval: {data / 'eval.jsonl'}, max_length: 600}}\n"
        "lora: {rank: 4, alpha: 8, dropout: 0.1, quantize: nf4}\n"
        "train: {epochs: 2, batch_size: 2, accumulation: 2, learning_rate: 1e-2, precision: fp32, save_steps: 2}\n"
    )
    (folder / "r.yaml").write_text(text)
    return folder / "r.yaml"


def run(path: Path, *overrides: str, resume: bool = False) -> Path:
    recipe = load_recipe(path, TrainRecipe, overrides)
    assert train(recipe, "r", resume=resume, fresh=False, dry_run=False, tell=lambda text: None).status == "done"
    assert recipe.out is not None
    return Path(recipe.out)


def losses(run: Path) -> list[float]:
    from intervale.core.runlog import read_metrics

    return [entry["loss"] for entry in read_metrics(run) if "loss" in entry]


def test_only_the_layers_matrices_are_rounded_and_to_near_values(tiny: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    plain, small = (load_network(tiny, dtype=torch.float32) for _ in range(2))
    count = quantize_layers(small, torch.float32, torch.device("cpu"))
    before = dict(plain.named_parameters())
    rounded = 0
    for name, parameter in small.named_parameters():
        assert is_quantised_later(name) == (parameter.dtype == torch.uint8), name
        if parameter.dtype != torch.uint8:
            assert torch.equal(parameter, before[name]), name
            continue
        rounded += 1
        back = dequantize_4bit(parameter.data, parameter.quant_state)
        assert float((back - before[name]).abs().mean() / before[name].abs().mean()) < 0.15, name
        assert parameter.numel() * 2 == before[name].numel()
    assert rounded == count > 0


def test_a_quantised_run_learns_resumes_bit_by_bit_and_exports_into_the_full_base(tmp_path: Path, tiny: Path, plates: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path = write_recipe(tmp_path, tiny, plates)
    folder = run(path)
    found = losses(folder)
    plain = run(path, "lora.quantize=none", f"out={tmp_path / 'plain'}")
    assert found != losses(plain)
    assert found == pytest.approx(losses(plain), rel=0.1)
    last = folder / "checkpoints" / "step-00000004"
    stored = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    for file in last.iterdir():
        file.unlink()
    (folder / "run.json").write_text('{"status": "stopped"}')
    run(path, resume=True)
    assert losses(folder) == found
    assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == stored
    export(folder, tmp_path / "model", "official", dtype=None, tell=lambda text: None)
    base, merged = (load_file(place / "model.safetensors") for place in (tiny, tmp_path / "model"))
    adapter = load_file(last / "adapter_model.safetensors")
    name = next(key for key in base if key.endswith("feed_forward.w2.weight"))
    down = [key for key in adapter if "layers.0.mlp.down_proj" in key]
    first, second = (adapter[next(key for key in down if part in key)] for part in ("lora_A", "lora_B"))
    assert torch.allclose(merged[name], base[name] + 2.0 * second @ first, atol=1e-6)  # the stored base, not its rounded copy


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="needs bitsandbytes") as caught:
        need_bitsandbytes()
    assert "intervale[quantize]" in caught.value.fix


def test_a_base_that_learns_or_is_dealt_out_is_not_quantised(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates)
    with pytest.raises(UserError, match=r"lora\.quantize is for a frozen language model"):
        load_recipe(path, TrainRecipe, ["train.llm=full"])
    with pytest.raises(UserError, match=r"lora\.quantize needs whole layers"):
        load_recipe(path, TrainRecipe, ["parallel.strategy=fsdp"])
