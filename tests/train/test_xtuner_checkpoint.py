"""`import-checkpoint`: what comes out is what merging the official way gives; a hostile file does nothing."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import run_command
from intervale.core.errors import UserError
from intervale.export.export import export
from intervale.model.convert import convert
from intervale.model.load import load_model
from intervale.model.pickled import Pickled, read_pickled
from intervale.train import xtuner_checkpoint
from intervale.train.xtuner_checkpoint import Summary, import_checkpoint
from xtuner_fixture import CONFIG, LEAVES, merged_officially, write_pth, xtuner_state

SCALE = 2.0  # alpha 8 over rank 4


def config_text() -> str:
    return CONFIG.replace("r=128, lora_alpha=256", "r=4, lora_alpha=8")


def take(file: Path, base: Path | None, out: Path, alpha: float | None = None, config: Path | None = None) -> Summary:
    return import_checkpoint(file, base, out, alpha=alpha, config=config, tell=lambda text: None)


def logits(folder: Path) -> torch.Tensor:
    network = load_model(folder, dtype=torch.float32, device="cpu").network
    ids = torch.randint(3, 250, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return network(input_ids=ids).logits


def test_imported_and_merged_is_merged_the_official_way(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = xtuner_state(tiny)
    file = write_pth(tmp_path / "iter_640.pth", state, monkeypatch, config_text())
    done = take(file, tiny, tmp_path / "adapter")
    assert (done.rank, done.alpha, done.iteration) == (4, 8.0, 640)
    assert (done.lora_layers, done.trained) == (2 * 7 + 1, 6)  # q, k, v, o, gate, up, down in two layers, and the head
    export(tmp_path / "adapter", tmp_path / "out", "official", dtype=None, tell=lambda text: None)
    expected, found = merged_officially(tiny, state, SCALE), load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-6, name
    before = load_file(tiny / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    assert changed == {name for name in before if name.startswith("mlp1.") or name.removesuffix(".weight").endswith((*LEAVES, "output"))}
    # And as a network: the official folder merged by hand, loaded through the model's own split of wqkv.
    shutil.copytree(tiny, tmp_path / "hand")
    save_file(expected, tmp_path / "hand" / "model.safetensors", metadata={"format": "pt"})
    assert (logits(tmp_path / "hand") - logits(tmp_path / "adapter")).abs().max() <= 2e-5
    assert (logits(tiny) - logits(tmp_path / "adapter")).abs().max() > 1e-2
    told = json.loads((tmp_path / "out" / "intervale.json").read_text())
    assert (told["step"], told["recipe"]["lora"]["rank"]) == (640, 4)


def test_the_commands_do_the_same(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {name: tensor.half() for name, tensor in xtuner_state(tiny, head=False).items()}
    file = write_pth(tmp_path / "iter_640.pth", state, monkeypatch)
    assert run_command(monkeypatch, "import-checkpoint", file, tmp_path / "a", "--base", tiny) == 1  # no alpha, no config
    assert not (tmp_path / "a").exists()
    assert run_command(monkeypatch, "import-checkpoint", file, tmp_path / "a", "--base", tiny, "--alpha", "8") == 0
    assert run_command(monkeypatch, "export", tmp_path / "a", tmp_path / "out", "--format", "official") == 0
    expected = merged_officially(tiny, {name: tensor.float() for name, tensor in state.items()}, SCALE)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all((found[name] - tensor).abs().max() <= 1e-6 for name, tensor in expected.items())
    assert run_command(monkeypatch, "info", tmp_path / "a") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "iter_640.pth", "out"]


def test_a_base_in_the_hf_format_gives_the_same_network(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(tiny, tmp_path / "hf", "hf")
    file = write_pth(tmp_path / "iter_640.pth", xtuner_state(tiny), monkeypatch, config_text())
    for base, name in ((tiny, "a"), (tmp_path / "hf", "b")):
        take(file, base, tmp_path / name)
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))
    export(tmp_path / "b", tmp_path / "out", "hf", dtype=None, tell=lambda text: None)
    assert (logits(tmp_path / "out") - logits(tmp_path / "a")).abs().max() <= 2e-5


def test_a_config_beside_the_file_gives_alpha_and_base(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_pth(tmp_path / "iter_640.pth", xtuner_state(tiny), monkeypatch)
    (tmp_path / "c.py").write_text(config_text().replace("MODEL", str(tiny)))
    done = take(file, None, tmp_path / "a", config=tmp_path / "c.py")
    assert (done.base, done.alpha) == (tiny, 8.0)
    (tmp_path / "d.py").write_text(CONFIG)
    with pytest.raises(UserError, match="rank"):
        take(file, tiny, tmp_path / "b", config=tmp_path / "d.py")


def test_narrow_lora_and_whole_weights_are_taken_too(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {name: tensor for name, tensor in xtuner_state(tiny).items() if "wqkv" in name or "mlp1" in name}
    vision = load_file(tiny / "model.safetensors")
    state |= {f"model.{name}": tensor + 0.01 for name, tensor in vision.items() if name.startswith("vision_model.")}
    file = write_pth(tmp_path / "x.pth", state, monkeypatch)
    take(file, tiny, tmp_path / "a", alpha=8)
    export(tmp_path / "a", tmp_path / "out", "official", dtype=None, tell=lambda text: None)
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = merged_officially(tiny, state, SCALE)
    for name, tensor in expected.items():
        wanted = tensor + 0.01 if name.startswith("vision_model.") else tensor
        assert (found[name] - wanted).abs().max() <= 1e-6, name


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda s: s.update(
                {"model.language_model.base_model.model.model.layers.9.attention.wo.lora_A.default.weight": torch.zeros(4, 64)}
            ),
            "no place for",
        ),
        (lambda s: s.update({"model.extra.weight": torch.zeros(2)}), r"no place for: model\.extra\.weight"),
        (lambda s: s.update({next(iter(s)): torch.zeros(4, 63)}), "of another shape"),
        (lambda s: s.pop(next(name for name in s if "lora_B" in name)), "incomplete"),
        (lambda s: s.pop("model.mlp1.1.weight"), "incomplete"),
        (lambda s: s["model.mlp1.1.weight"].fill_(float("nan")), "NaN"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(tmp_path: Path, tiny: Path, monkeypatch, change, why: str) -> None:
    state = xtuner_state(tiny)
    change(state)

    def read(path: Path, out: Path) -> Pickled:  # the sandbox has tests of its own; it takes a second each time
        save_file(state, out / "t.safetensors")
        return Pickled(out / "t.safetensors", {"cfg": config_text()})

    monkeypatch.setattr(xtuner_checkpoint, "read_pickled", read)
    with pytest.raises(UserError, match=why) as caught:
        take(tmp_path / "x.pth", tiny, tmp_path / "a")
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.zeros(2, dtype=torch.int64), "plain floating-point"),
        (torch.zeros(1).expand(1 << 40), "more bytes than the file"),
        ("text", "not a tensor"),
    ],
)
def test_what_is_no_plain_tensor_does_not_leave_the_sandbox(tmp_path: Path, value: object, why: str) -> None:
    torch.save({"state_dict": {"model.mlp1.1.weight": value}}, tmp_path / "x.pth")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=why):
        read_pickled(tmp_path / "x.pth", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


class _Attack:
    """Touches the sentinel when it is unpickled the ordinary way."""

    def __init__(self, sentinel: Path, way: str) -> None:
        self.sentinel, self.way = sentinel, way

    def __reduce__(self):  # type: ignore[no-untyped-def]
        if self.way == "system":
            return os.system, (f"touch {self.sentinel}",)
        if self.way == "exec":
            return exec, (f"open({str(self.sentinel)!r}, 'w')",)
        return open, (str(self.sentinel), "w")


@pytest.mark.parametrize(("way", "form"), [("system", "zip"), ("exec", "zip"), ("open", "legacy"), ("system", "bare")])
def test_a_hostile_pickle_does_nothing(tmp_path: Path, tiny: Path, way: str, form: str) -> None:
    sentinel = tmp_path / "ran"
    value = {"state_dict": xtuner_state(tiny), "meta": _Attack(sentinel, way)}
    file = tmp_path / "iter_640.pth"
    if form == "bare":
        file.write_bytes(pickle.dumps(_Attack(sentinel, way)))
    else:
        torch.save(value, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"iter_640\.pth: it (asks for|is not a checkpoint)") as caught:
        take(file, tiny, tmp_path / "a", alpha=8)
    if form != "bare":
        assert "code, not a tensor; nothing of it was run" in caught.value.what
    assert [path.name for path in tmp_path.iterdir()] == ["iter_640.pth"]
    pickle.loads(pickle.dumps(_Attack(sentinel, "open")))  # the sentinel is one: opened the ordinary way it appears
    assert sentinel.exists()


def test_a_bomb_meets_the_limits(tmp_path: Path) -> None:
    """A compressed member that unfolds to a thousand times the file."""
    torch.save({"state_dict": {"x": torch.zeros(1 << 24)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert (tmp_path / "bomb.pth").stat().st_size < 1 << 20
    (tmp_path / "out").mkdir()
    for memory, why in ((16 << 20, "needs more than the 16 MiB"), (512 << 20, "more bytes than the file has")):
        with pytest.raises(UserError, match=why):
            read_pickled(tmp_path / "bomb.pth", tmp_path / "out", memory=memory)


def test_a_flipped_bit_of_a_weight_is_found(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = xtuner_state(tiny)
    file = write_pth(tmp_path / "iter_640.pth", state, monkeypatch, config_text())
    data = bytearray(file.read_bytes())
    data[data.index(state["model.mlp1.1.weight"].numpy().tobytes()) + 1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="it is damaged: its part"):
        take(file, tiny, tmp_path / "a")


def test_a_file_that_takes_for_ever_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "long.pth").write_bytes(b"\x80\x02N" + b"q\x00" * 20_000_000 + b".")  # None, remembered again and again
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"long\.pth: reading it was stopped \(more than 1 s"):
        read_pickled(tmp_path / "long.pth", tmp_path / "out", seconds=1)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", b"hello", io.BytesIO(b"\x80\x02c__main__\nx\n.").getvalue()])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, tiny: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth: it"):
        take(tmp_path / "x.pth", tiny, tmp_path / "a", alpha=8)
    with pytest.raises(UserError, match="no such file"):
        take(tmp_path / "y.pth", tiny, tmp_path / "a", alpha=8)
    with pytest.raises(UserError, match="DeepSpeed"):
        take(tiny, tiny, tmp_path / "a", alpha=8)
