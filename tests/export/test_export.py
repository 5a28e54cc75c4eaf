import json
from pathlib import Path

import pytest
import torch

from intervale.core.config import load_recipe
from intervale.core.errors import UserError
from intervale.export import export as exporting
from intervale.export.export import PROVENANCE, export
from intervale.model.adapt import ADAPTER, checkpoint_of
from intervale.model.convert import convert
from intervale.model.load import load_model, load_network, load_text_side
from intervale.model.source import open_source
from intervale.train.loop import train
from intervale.train.recipe import TrainRecipe


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny: Path, plates: Path) -> Path:
    """A short LoRA run (head included, projector trained) on the tiny model, with fewer tiles than the model's own."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "r.yaml").write_text(
        f"model: {tiny}\nout: {folder / 'run'}\ndata: {{train: {plates / 'train.jsonl'}, max_tiles: 2}}\n"
        "lora: {rank: 4, alpha: 16, targets: llm+head}\ntrain: {epochs: 2, learning_rate: 5e-3}\n"
    )
    recipe = load_recipe(folder / "r.yaml", TrainRecipe)
    train(recipe, "r", resume=False, fresh=False, dry_run=False, tell=lambda text: None)
    return folder / "run"


def logits(folder: Path) -> torch.Tensor:
    network = load_model(folder, dtype=torch.float32, device="cpu").network
    ids = torch.randint(3, 250, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return network(input_ids=ids).logits


@pytest.mark.parametrize("to", ["hf", "official"])
def test_the_merged_export_gives_the_adapter_models_logits(tmp_path: Path, tuned: Path, tiny: Path, to: str) -> None:
    proof = export(tuned, tmp_path / "out", to, dtype=None, tell=lambda text: None)
    assert (logits(tmp_path / "out") - logits(tuned)).abs().max() <= 2e-5
    assert (logits(tuned) - logits(tiny)).abs().max() > 1e-2
    assert proof.changed_tensors == 2 * 7 + 1 + 6  # seven linears in two layers, the head, the projector
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text())["train"]["items"] == 8


def test_what_was_not_trained_is_copied_byte_for_byte(tmp_path: Path, tuned: Path, tiny: Path) -> None:
    export(tuned, tmp_path / "out", "official", dtype=None, tell=lambda text: None)
    from safetensors.torch import load_file

    before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert all(name in same for name in before if name.startswith("vision_model"))
    assert not any("wqkv" in name for name in same)


def test_the_export_cuts_pictures_as_the_run_did(tmp_path: Path, tuned: Path) -> None:
    export(tuned, tmp_path / "out", "hf", dtype=None, tell=lambda text: None)
    assert load_text_side(tuned).tiling == load_text_side(tmp_path / "out").tiling
    assert load_text_side(tuned).tiling.max_tiles == 2
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["max_patches"] == 2


def test_a_rounded_export_says_what_rounding_cost(tmp_path: Path, tuned: Path) -> None:
    proof = export(tuned, tmp_path / "out", "hf", dtype=torch.bfloat16, tell=lambda text: None)
    assert proof.reload_difference <= 2e-5 * max(1.0, proof.largest_logit)
    assert 1e-6 < proof.rounding_difference < 0.5
    assert {p.dtype for p in load_network(tmp_path / "out").parameters()} == {torch.bfloat16}


def test_a_silent_no_op_is_refused(tmp_path: Path, tuned: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tuned, tmp_path / "run")
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    (checkpoint / "trained.safetensors").unlink()
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in adapter.items()}
    save_file(zero, checkpoint / "adapter_model.safetensors")
    with pytest.raises(UserError, match="safetensors is damaged"):
        export(tmp_path / "run", tmp_path / "out", "hf", dtype=None, tell=lambda text: None)
    (checkpoint / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match="nothing changed"):
        export(tmp_path / "run", tmp_path / "out", "hf", dtype=None, tell=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_what_an_export_says_of_itself_stays_with_its_weights(tmp_path: Path, tuned: Path) -> None:
    export(tuned, tmp_path / "one", "official", dtype=None, tell=lambda text: None)
    told = (tmp_path / "one" / PROVENANCE).read_text()
    convert(tmp_path / "one", tmp_path / "two", "hf")
    convert(tmp_path / "two", tmp_path / "three", "official")
    for name in ("two", "three"):
        assert (tmp_path / name / PROVENANCE).read_text() == told
    assert not (tmp_path / "two" / "official_source" / PROVENANCE).exists()


def test_a_base_that_changed_since_is_refused(tmp_path: Path, tuned: Path, tiny: Path) -> None:
    import shutil

    shutil.copytree(tuned, tmp_path / "run")
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    base = json.loads((checkpoint / "base.json").read_text())
    (checkpoint / "base.json").write_text(json.dumps(base | {"fingerprint": "0" * 16}))
    with pytest.raises(UserError, match="has changed since training"):
        export(tmp_path / "run", tmp_path / "out", "hf", dtype=None, tell=lambda text: None)
    (checkpoint / "base.json").write_text(json.dumps(base | {"folder": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="not there any more"):
        export(tmp_path / "run", tmp_path / "out", "hf", dtype=None, tell=lambda text: None)


def test_a_written_folder_that_differs_is_removed(tmp_path: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from intervale.model import convert

    real = convert.save_file

    def damage(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        real(tensors | {name: tensors[name] * 1.01}, path, **options)

    monkeypatch.setattr(convert, "save_file", damage)
    with pytest.raises(UserError, match="does not give the logits"):
        export(tuned, tmp_path / "out", "hf", dtype=None, tell=lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_opens_in_plain_peft(tmp_path: Path, tuned: Path, tiny: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    from intervale.model.adapt import load_trained

    checkpoint = next((tuned / "checkpoints").iterdir())
    assert all(name.startswith("base_model.model.") for name in load_file(checkpoint / "adapter_model.safetensors"))
    network = load_network(tiny, dtype=torch.float32)
    load_trained(network, checkpoint / "trained.safetensors")
    plain = PeftModel.from_pretrained(network, str(checkpoint)).eval()
    ids = torch.randint(3, 250, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, logits(tuned))


def test_the_gpu_computes_the_logits_where_it_has_room_for_network_adapter_and_merge(
    tuned: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, checkpoint = open_source(tiny), checkpoint_of(tuned)
    assert checkpoint is not None
    numbers = [tensor.numel() for _, tensor in source.natives()]
    needed = 4 * (sum(numbers) + 3 * max(numbers)) + (2 << 30)
    free = {"here": 0}
    monkeypatch.setattr(exporting, "as_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["here"], 1 << 40))

    def place(room: int, checkpoint: Path | None) -> str:
        free["here"] = room
        return exporting._place_for(source, checkpoint).type

    adapter = (checkpoint / ADAPTER).stat().st_size
    assert (place(needed, None), place(needed - 1, None)) == ("cuda", "cpu")
    assert (place(needed + adapter, checkpoint), place(needed + adapter - 1, checkpoint)) == ("cuda", "cpu")
