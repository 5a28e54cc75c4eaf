"""The store gives back exactly what was put, or nothing; a key changes with what the features depend on, and with nothing else."""

import errno
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from intervale.data.tiling import Tiling
from intervale.model import features as module
from intervale.model.convert import convert
from intervale.model.feature_plan import HEAD, default_store_folder, plan_features
from intervale.model.features import FeatureStore, bytes_needed, picture_key, tower_digest
from intervale.model.source import open_source

MIB = 1 << 20


def key_of(number: int) -> str:
    return picture_key(f"{number:064x}", Tiling(), "tower", "tower", torch.float32)


def drawn(number: int, dtype: torch.dtype = torch.float32, tiles: int = 3) -> torch.Tensor:
    return torch.randn(tiles, 4, 16, generator=torch.Generator().manual_seed(number)).to(dtype)


SIZE = HEAD + drawn(0).nbytes


def fresh(folder: Path | None, told: list[str] | None = None, disk: int = MIB, ram: int = 0) -> FeatureStore:
    return FeatureStore(folder, disk_budget=disk, ram_budget=ram, tell=(told if told is not None else []).append)


def file_of(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.feat"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiles", [1, 13])
def test_what_was_put_comes_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype, tiles: int) -> None:
    key, tensor = key_of(1), drawn(1, dtype, tiles)
    store = fresh(tmp_path)
    assert key not in store
    assert store.get(key) is None
    assert store.put(key, tensor) == "disk"
    for reader in (store, fresh(tmp_path)):
        back = reader.get(key)
        assert key in reader
        assert back is not None
        assert back.dtype == dtype
        assert back.view(torch.uint8).equal(tensor.view(torch.uint8))
    assert store.bytes_on_disk == fresh(tmp_path).bytes_on_disk == HEAD + tensor.nbytes == file_of(tmp_path, key).stat().st_size


def test_nothing_but_entries_is_left_in_the_folder(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    for number in range(5):
        store.put(key_of(number), drawn(number))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(f"{key_of(n)}.feat" for n in range(5))


def test_an_entry_cut_anywhere_is_absent_and_written_again(tmp_path: Path) -> None:
    key, tensor = key_of(1), drawn(1)
    fresh(tmp_path).put(key, tensor)
    whole = file_of(tmp_path, key).read_bytes()
    for length in (0, 1, HEAD - 1, HEAD, HEAD + 1, len(whole) // 2, len(whole) - 1, len(whole) + 1):
        file_of(tmp_path, key).write_bytes((whole + b"\0")[:length])
        told: list[str] = []
        store = fresh(tmp_path, told)
        assert key not in store
        assert store.get(key) is None
        assert len(told) == 1
        assert key in told[0]
        assert store.put(key, tensor) == "disk"
        assert store.bytes_on_disk == SIZE
        assert file_of(tmp_path, key).read_bytes() == whole
        assert torch.equal(store.get(key), tensor)
        assert store.damaged == 0


def test_a_flipped_bit_anywhere_makes_an_entry_absent(tmp_path: Path) -> None:
    key, tensor = key_of(1), drawn(1)
    store = fresh(tmp_path)
    store.put(key, tensor)
    whole = file_of(tmp_path, key).read_bytes()
    for place in [*range(HEAD), *range(HEAD, len(whole), 7), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file_of(tmp_path, key).write_bytes(flipped)
        assert fresh(tmp_path).get(key) is None, place
        assert store.get(key) is None, place  # also for a process that has read it before
        store.put(key, tensor)
        assert torch.equal(store.get(key), tensor)


def test_another_pictures_file_under_this_name_is_absent(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    store.put(key_of(1), drawn(1))
    file_of(tmp_path, key_of(2)).parent.mkdir(exist_ok=True)
    os.replace(file_of(tmp_path, key_of(1)), file_of(tmp_path, key_of(2)))
    assert store.get(key_of(2)) is None
    assert store.get(key_of(1)) is None


def test_damage_is_told_once_and_counted(tmp_path: Path) -> None:
    told: list[str] = []
    store = fresh(tmp_path, told)
    for number in range(4):
        store.put(key_of(number), drawn(number))
        file_of(tmp_path, key_of(number)).write_bytes(b"x")
        assert store.get(key_of(number)) is None
    assert len(told) == 1
    assert store.damaged == 4


def _write_and_read(folder: Path, start: int) -> None:
    store = fresh(folder)
    for turn in range(3):
        for number in range(start, start + 40):
            key, tensor = key_of(number % 40), drawn(number % 40)
            if turn == 1:
                store._broken.add(key)  # so that it is written over while the other process reads
            store.put(key, tensor)
            back = store.get(key)
            assert back is not None
            assert torch.equal(back, tensor)
    assert store.damaged == 0


def test_processes_may_write_the_same_keys(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_and_read, args=(tmp_path, start)) for start in (0, 5, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    store = fresh(tmp_path)
    assert all(torch.equal(store.get(key_of(number)), drawn(number)) for number in range(40))
    assert store.bytes_on_disk == 40 * SIZE
    assert not list(tmp_path.rglob("*.partial"))


def test_a_process_that_dies_while_writing_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*names: object) -> None:
        raise KeyboardInterrupt

    store = fresh(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            store.put(key_of(1), drawn(1))
    assert fresh(tmp_path).get(key_of(1)) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_disk_budget_holds_and_the_rest_goes_to_memory_then_nowhere(tmp_path: Path) -> None:
    told: list[str] = []
    store = fresh(tmp_path, told, disk=3 * SIZE, ram=2 * drawn(0).nbytes)
    places = [store.put(key_of(number), drawn(number)) for number in range(7)]
    assert places == ["disk"] * 3 + ["ram"] * 2 + ["none"] * 2
    assert store.bytes_on_disk == 3 * SIZE == sum(path.stat().st_size for path in tmp_path.rglob("*.feat"))
    assert store.bytes_in_ram == 2 * drawn(0).nbytes
    for number in range(5):
        assert torch.equal(store.get(key_of(number)), drawn(number))
    assert store.get(key_of(5)) is None
    assert len(told) == 1
    assert store.put(key_of(0), drawn(0)) == "disk"  # an entry of this run was not dropped for another


def test_the_budget_counts_what_other_processes_wrote(tmp_path: Path) -> None:
    ours, theirs = fresh(tmp_path, disk=32 * SIZE), fresh(tmp_path, disk=32 * SIZE)
    for number in range(40):
        ours.put(key_of(number), drawn(number))
        theirs.put(key_of(100 + number), drawn(number))
    total = sum(path.stat().st_size for path in tmp_path.rglob("*.feat"))
    assert total <= (32 + 2 * 2) * SIZE  # each may be 1/16 behind


def test_without_a_folder_memory_alone_is_used() -> None:
    store = fresh(None, ram=2 * drawn(0).nbytes)
    batch = torch.randn(8, 4, 16)
    assert store.put(key_of(1), batch[2:5]) == "ram"
    assert store.put(key_of(2), drawn(2)) == "ram"
    assert store.put(key_of(3), drawn(3)) == "none"
    held = store.get(key_of(1))
    assert torch.equal(held, batch[2:5])
    assert held.untyped_storage().nbytes() == held.nbytes  # a part does not keep the whole batch
    assert key_of(1) in store
    assert key_of(3) not in store
    assert store.bytes_on_disk == 0


@pytest.mark.parametrize("place", ["/proc/nowhere/features", "a-file"])
def test_a_folder_that_takes_no_writes_falls_back_to_memory_with_one_message(tmp_path: Path, place: str) -> None:
    (tmp_path / "a-file").write_text("x")
    told: list[str] = []
    store = fresh(tmp_path / place, told, ram=MIB)
    for number in range(3):
        assert store.put(key_of(number), drawn(number)) == "ram"
        assert torch.equal(store.get(key_of(number)), drawn(number))
    assert store.bytes_on_disk == 0
    assert len(told) == 1


def test_a_folder_that_became_read_only_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(tmp_path).put(key_of(0), drawn(0))
    os.utime(file_of(tmp_path, key_of(0)), (0, 0))

    def refuse(*names: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module.os, "utime", refuse)
    monkeypatch.setattr(module, "_write_aside", refuse)
    told: list[str] = []
    store = fresh(tmp_path, told, ram=MIB)
    assert torch.equal(store.get(key_of(0)), drawn(0))
    assert [store.put(key_of(number), drawn(number)) for number in range(3)] == ["disk", "ram", "ram"]
    assert store.bytes_on_disk == SIZE
    assert len(told) == 1
    assert "Read-only" in told[0]


def test_a_full_disk_falls_back_to_memory_with_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    store = fresh(tmp_path, told, ram=MIB)
    assert store.put(key_of(0), drawn(0)) == "disk"
    monkeypatch.setattr(module, "free_disk", lambda folder: 1000)
    assert [store.put(key_of(number), drawn(number)) for number in (1, 2)] == ["ram", "ram"]
    assert store.bytes_on_disk == SIZE
    assert len(told) == 1
    assert all(torch.equal(store.get(key_of(number)), drawn(number)) for number in range(3))


def test_copies_of_what_is_on_the_disk_make_room_in_memory(tmp_path: Path) -> None:
    store = fresh(tmp_path, disk=2 * SIZE, ram=2 * drawn(0).nbytes)
    assert [store.put(key_of(number), drawn(number)) for number in range(4)] == ["disk", "disk", "ram", "ram"]
    assert all(torch.equal(store.get(key_of(number)), drawn(number)) for number in range(4))
    assert store.bytes_in_ram == 2 * drawn(0).nbytes


def test_trimming_removes_the_least_recently_used_and_never_the_present_runs(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    for number in range(6):
        store.put(key_of(number), drawn(number))
        stamp = time.time() - 100_000 + 10_000 * number
        os.utime(file_of(tmp_path, key_of(number)), (stamp, stamp))
    assert fresh(tmp_path).get(key_of(1)) is not None  # used again
    assert store.trim(3 * SIZE, keep={key_of(0)}) == 3 * SIZE
    assert [number for number in range(6) if key_of(number) in store] == [0, 1, 5]
    assert store.bytes_on_disk == 3 * SIZE
    assert store.trim(0, keep={key_of(number) for number in range(6)}) == 0


def test_trimming_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    store.put(key_of(1), drawn(1))
    old, new = (file_of(tmp_path, key_of(1)).with_name(f".{name}.partial") for name in ("old", "new"))
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    store.trim(MIB)
    assert (old.exists(), new.exists(), key_of(1) in store) == (False, True, True)


def test_a_key_changes_with_everything_the_features_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = Tiling()
    base = ("a" * 64, tiling, "t", "tower", torch.bfloat16)
    others = [("b" * 64, *base[1:]), (*base[:2], "u", *base[3:]), (*base[:3], "projected", base[4]), (*base[:4], torch.float32)]
    for field, value in {"tile_size": 224, "min_tiles": 2, "max_tiles": 6, "thumbnail": False, "tokens_per_tile": 64}.items():
        others.append((base[0], replace(tiling, **{field: value}), *base[2:]))
    keys = {picture_key(*arguments) for arguments in [base, *others]}
    monkeypatch.setattr(module, "PREPROCESSING_VERSION", module.PREPROCESSING_VERSION + 1)
    keys.add(picture_key(*base))
    assert len(keys) == len(others) + 2


def _changed(tiny: Path, folder: Path, prefix: str, shards: int = 1) -> Path:
    """A copy of a model with the last bit of one tensor of `prefix` changed, in several files."""
    folder.mkdir()
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tiny / "model.safetensors")
    if prefix:
        name = next(name for name in sorted(tensors) if name.startswith(prefix) and tensors[name].dim() == 2)
        tensors[name].view(torch.int32)[-1, -1] ^= 1
    names = sorted(tensors)
    for shard in range(shards):
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / f"part-{shard}.safetensors", {"format": "pt"})
    return folder


def test_a_digest_names_the_towers_weights_and_no_others(tiny: Path, tmp_path: Path) -> None:
    plain, whole = tower_digest(tiny), tower_digest(tiny, projector=True)
    assert plain != whole
    assert plain == tower_digest(open_source(tiny))
    moved = _changed(tiny, tmp_path / "sharded", "", shards=3)
    llm = _changed(tiny, tmp_path / "llm", "language_model.")
    projector = _changed(tiny, tmp_path / "projector", "mlp1.")
    tower = _changed(tiny, tmp_path / "tower", "vision_model.encoder.layers.1.attn.qkv")
    assert (tower_digest(moved), tower_digest(moved, projector=True)) == (plain, whole)
    assert (tower_digest(llm), tower_digest(llm, projector=True)) == (plain, whole)
    assert tower_digest(projector) == plain
    assert tower_digest(projector, projector=True) != whole
    assert tower_digest(tower) != plain


def test_a_digest_is_the_same_in_both_formats(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "official")
    for projector in (False, True):
        digests = {tower_digest(folder, projector=projector) for folder in (tiny, tmp_path / "hf", tmp_path / "back")}
        assert len(digests) == 1


@pytest.mark.parametrize(
    ("old", "new"), [('"select_layer": -1', '"select_layer": -2'), ('"layer_norm_eps": 1e-06', '"layer_norm_eps": 1e-05')]
)
def test_a_digest_changes_with_the_towers_settings(tiny: Path, tmp_path: Path, old: str, new: str) -> None:
    folder = _changed(tiny, tmp_path / "other", "")
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))
    assert tower_digest(folder) != tower_digest(tiny)


def test_the_bytes_are_known_before_anything_is_computed(tiny: Path, tmp_path: Path) -> None:
    config, tiling = open_source(tiny).config, Tiling(56, 1, 4, True, 4)
    store = fresh(tmp_path)
    for number in range(3):
        store.put(key_of(number), torch.zeros(5, 4, 256, dtype=torch.bfloat16))
    assert bytes_needed(config, tiling, 15, 3, "tower", torch.bfloat16) == store.bytes_on_disk
    assert bytes_needed(config, tiling, 15, 3, "projected", torch.bfloat16) == 15 * 4 * 64 * 2 + 3 * HEAD


def test_the_plan_names_the_place_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    wide = {"free_ram": 40 * gib, "folder": tmp_path, "disk_budget": 4 * gib}
    assert plan_features(gib // 1024, **wide).place == "ram"
    assert plan_features(gib // 1024, **wide, disk_first=True).place == "disk"
    assert plan_features(gib // 1024, **(wide | {"free_ram": 0})).place == "disk"
    none = plan_features(50 * gib, **wide)
    assert none.place == "live"
    assert "50.00 GiB" in none.why
    assert str(tmp_path) in none.why
    assert plan_features(9 * gib, **(wide | {"folder": None})).place == "ram"
    assert plan_features(11 * gib, **(wide | {"folder": None})).place == "live"
    monkeypatch.setenv("INTERVALE_LANG", "zh")
    assert "内存" in plan_features(gib, **wide).why


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERVALE_CACHE", "/somewhere/else")
    assert default_store_folder() == Path("/somewhere/else")
    monkeypatch.delenv("INTERVALE_CACHE")
    assert default_store_folder() == Path.home() / ".cache/intervale/features"
