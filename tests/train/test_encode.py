"""Features from the store are the live ones; the pre-pass skips, lists, survives and ends where it should."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from intervale.core.errors import UserError
from intervale.core.records import read_records
from intervale.data.images import PictureError, load_picture
from intervale.data.pictures import count_tiles, hash_pictures, pictures_of
from intervale.data.tiling import Tiling, cut_tiles
from intervale.model.features import FeatureStore, Stage, bytes_needed
from intervale.model.forward import normalise, picture_features, tower_features
from intervale.model.load import load_network, text_side
from intervale.train import encode
from intervale.train.encode import Encoded, encode_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network(tiny: Path) -> torch.nn.Module:
    return load_network(tiny, dtype=torch.float32)


@pytest.fixture(scope="module")
def tiling(tiny: Path) -> Tiling:
    return text_side(tiny).tiling


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Noise of many shapes: 1 to 5 tiles a picture."""
    random = np.random.Generator(np.random.Philox(7))
    paths = []
    for number, (width, height) in enumerate([(60, 60), (120, 60), (200, 55), (60, 130), (112, 112), (300, 90), (56, 56)]):
        paths.append(tmp_path / f"photo-{number}.png")
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def run(pictures: object, network: torch.nn.Module, tiling: Tiling, store: FeatureStore, **settings: object) -> Encoded:
    settings = {"digest": "d", "dtype": torch.float32, "device": CPU, "stage": "tower", "workers": 2, "tell": lambda text: None} | settings
    return encode_pictures(pictures, network, tiling, store, **settings)


def memory(ram: int = 1 << 30) -> FeatureStore:
    return FeatureStore(None, ram_budget=ram, tell=lambda text: None)


@torch.no_grad()
def live(network: torch.nn.Module, path: Path, tiling: Tiling, stage: Stage, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tiles = torch.from_numpy(cut_tiles(load_picture(path), tiling).copy())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return (tower_features if stage == "tower" else picture_features)(network, normalise(tiles, dtype))


@pytest.mark.parametrize("stage", ["tower", "projected"])
@pytest.mark.parametrize("workers", [0, 2])
def test_stored_features_are_the_live_ones_whatever_the_batch(
    network: torch.nn.Module, tiling: Tiling, photos: list[Path], tmp_path: Path, stage: Stage, workers: int
) -> None:
    assert {len(cut_tiles(load_picture(path), tiling)) for path in photos} >= {1, 3, 5}
    for size in (1, 2, 4, 7, 64):
        folder = tmp_path / f"store-{size}"
        done = run(photos, network, tiling, FeatureStore(folder, disk_budget=1 << 30), stage=stage, workers=workers, batch_tiles=size)
        assert (done.computed, done.left, done.bad) == (len(photos), 0, [])
        store = FeatureStore(folder)
        for path in photos:
            stored, expected = store.get(done.keys[path]), live(network, path, tiling, stage)
            assert stored.shape == expected.shape
            assert (stored - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())


@pytest.mark.parametrize("stage", ["tower", "projected"])
def test_one_picture_in_one_batch_is_equal_bit_by_bit(network: torch.nn.Module, tiling: Tiling, photos: list[Path], stage: Stage) -> None:
    store = memory()
    for path in photos:
        key = run([path], network, tiling, store, stage=stage).keys[path]
        assert torch.equal(store.get(key), live(network, path, tiling, stage))


@pytest.mark.parametrize("stage", ["tower", "projected"])
def test_bfloat16_is_kept_in_the_type_that_training_sees(tiny: Path, tiling: Tiling, photos: list[Path], stage: Stage) -> None:
    network = load_network(tiny, dtype=torch.bfloat16)
    store = memory()
    for path in photos[:3]:
        key = run([path], network, tiling, store, stage=stage, dtype=torch.bfloat16).keys[path]
        stored, expected = store.get(key), live(network, path, tiling, stage, torch.bfloat16)
        assert stored.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(stored, expected)
    tiles = sum(len(cut_tiles(load_picture(path), tiling)) for path in photos[:3])
    assert store.bytes_in_ram == bytes_needed(network.config, tiling, tiles, 0, stage, torch.bfloat16)


def test_loading_by_processes_gives_the_same(
    network: torch.nn.Module, tiling: Tiling, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pictures = [*photos, tmp_path / "bad.png"]
    threads, processes = memory(), memory()
    first = run(pictures, network, tiling, threads, batch_tiles=4)
    ahead = encode._tiles_ahead
    monkeypatch.setattr(encode, "_tiles_ahead", lambda todo, tiling, workers, beside: ahead(todo, tiling, workers, True))
    second = run(pictures, network, tiling, processes, batch_tiles=4)
    assert first.keys == second.keys
    assert [(path, str(error)) for path, error in first.bad] == [(path, str(error)) for path, error in second.bad]
    assert len(first.bad) == 1
    assert all(torch.equal(threads.get(key), processes.get(key)) for key in first.keys.values())


def test_a_padded_last_batch_changes_nothing(network: torch.nn.Module, tiling: Tiling, photos: list[Path]) -> None:
    shapes = []

    def forward(tiles: torch.Tensor) -> torch.Tensor:
        shapes.append(len(tiles))
        return tower_features(network, normalise(tiles, torch.float32))

    store = memory()
    encoder = encode._Encoder(forward, store, CPU, 8, pad=True)
    with torch.no_grad():
        for number, path in enumerate(photos):
            encoder.add(f"{number:040x}", torch.from_numpy(cut_tiles(load_picture(path), tiling).copy()))
        encoder.finish()
    encoder.close()
    assert set(shapes) == {8}
    for number, path in enumerate(photos):
        assert torch.allclose(store.get(f"{number:040x}"), live(network, path, tiling, "tower"), atol=1e-6)


def test_identical_files_are_one_picture_and_names_do_not_matter(
    network: torch.nn.Module, tiling: Tiling, photos: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    copies = [Path(shutil.copy(path, tmp_path / "other" / f"renamed-{number}.jpg")) for number, path in enumerate(photos)]
    store = memory()
    first = run([*photos, *copies], network, tiling, store)
    assert first.computed == len(photos)
    assert [first.keys[path] for path in photos] == [first.keys[path] for path in copies]
    assert len(set(first.keys.values())) == len(photos)
    told: list[str] = []
    again = run(copies, network, tiling, store, tell=told.append)
    assert again.computed == 0
    assert again.keys == {path: first.keys[path] for path in copies}
    assert told == [f"features: {len(photos)} pictures, {len(photos)} of them kept already"]


def test_only_what_is_missing_or_damaged_is_computed(network: torch.nn.Module, tiling: Tiling, photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    done = run(photos, network, tiling, FeatureStore(folder, disk_budget=1 << 30))
    files = {key: folder / key[:2] / f"{key}.feat" for key in done.keys.values()}
    files[done.keys[photos[0]]].unlink()
    cut = files[done.keys[photos[1]]]
    cut.write_bytes(cut.read_bytes()[:-1])
    told: list[str] = []
    assert run(photos, network, tiling, FeatureStore(folder, disk_budget=1 << 30, tell=told.append)).computed == 2
    assert len(told) == 1
    assert run(photos, network, tiling, FeatureStore(folder, disk_budget=1 << 30)).computed == 0


def test_a_picture_whose_bytes_change_has_another_key(network: torch.nn.Module, tiling: Tiling, photos: list[Path]) -> None:
    store = memory()
    before = run(photos, network, tiling, store).keys
    data = photos[0].read_bytes()
    photos[0].write_bytes(data + b"\0")  # still the same pixels: bytes are what is named
    after = run(photos, network, tiling, store).keys
    assert before.pop(photos[0]) != after.pop(photos[0])
    assert before == after


def test_unreadable_pictures_are_listed_and_the_rest_is_computed(
    network: torch.nn.Module, tiling: Tiling, photos: list[Path], tmp_path: Path
) -> None:
    named = {path: f"train.jsonl:{number}: {path.name}" for number, path in enumerate(photos)}
    whole = photos[1].read_bytes()
    cut, twin, empty, gone = (tmp_path / name for name in ("cut.png", "twin.png", "empty.png", "gone.png"))
    cut.write_bytes(whole[: len(whole) // 2])
    twin.write_bytes(cut.read_bytes())
    empty.write_bytes(b"")
    named |= {path: f"train.jsonl:9{path.name}" for path in (cut, twin, empty, gone, tmp_path)}
    done = run(named, network, tiling, memory())
    assert set(done.keys) == set(photos)
    assert [path for path, _ in done.bad] == [cut, twin, empty, gone, tmp_path]
    for path, error in done.bad:
        assert isinstance(error, PictureError)
        assert error.what.startswith(named[path])


def test_a_file_that_changes_between_naming_and_reading_is_listed(
    network: torch.nn.Module, tiling: Tiling, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_then_change(*arguments: object) -> dict[Path, str | UserError]:
        found = hash_pictures(*arguments)
        shutil.copy(photos[1], photos[0])
        return found

    monkeypatch.setattr(encode, "hash_pictures", hash_then_change)
    done = run(photos, network, tiling, memory())
    assert [path for path, _ in done.bad] == [photos[0]]
    assert photos[0] not in done.keys


def test_an_interruption_keeps_what_is_stored(network: torch.nn.Module, tiling: Tiling, photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    real, calls = encode.tower_features, []

    def interrupted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    network.model.vision_tower.train()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encode, "tower_features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(photos, network, tiling, FeatureStore(folder, disk_budget=1 << 30), batch_tiles=3)
    assert network.model.vision_tower.training  # as it was
    network.model.vision_tower.eval()
    rest = run(photos, network, tiling, FeatureStore(folder, disk_budget=1 << 30), batch_tiles=3)
    assert 0 < rest.computed < len(photos)
    store = FeatureStore(folder)
    for path in photos:
        assert torch.allclose(store.get(rest.keys[path]), live(network, path, tiling, "tower"), atol=1e-6)


def test_a_full_store_ends_the_pass_and_every_picture_keeps_its_key(network: torch.nn.Module, tiling: Tiling, photos: list[Path]) -> None:
    told: list[str] = []
    store = memory(ram=5 * 4 * 256 * 4)
    done = run(photos, network, tiling, store, batch_tiles=1, workers=0, tell=told.append)
    assert set(done.keys) == set(photos)
    kept = sum(key in store for key in done.keys.values())
    assert 0 < kept < len(photos)
    assert done.left == len(photos) - kept
    assert f"{done.left} have no room" in told[-1]


def test_a_store_without_room_is_not_computed_for(network: torch.nn.Module, tiling: Tiling, photos: list[Path]) -> None:
    done = run(photos, network, tiling, memory(ram=0), batch_tiles=1, workers=0)
    assert done.computed < len(photos)  # the first "none" ends it; a few more may be under way by then
    assert done.left == len(photos)


def test_pictures_and_tiles_of_a_data_set_are_known_beforehand(
    network: torch.nn.Module, tiling: Tiling, plates: Path, tmp_path: Path
) -> None:
    pictures = pictures_of(read_records(plates / "train.jsonl"))
    assert len(pictures) == 8
    assert all(path.is_file() and path.name in where for path, where in pictures.items())
    store = FeatureStore(tmp_path / "store", disk_budget=1 << 30)
    run(pictures, network, tiling, store)
    count, tiles = count_tiles(pictures, tiling)
    assert count == 8
    assert store.bytes_on_disk == bytes_needed(network.config, tiling, tiles, count, "tower", torch.float32)


def test_progress_is_told_with_a_rate_and_the_time_left(
    network: torch.nn.Module, tiling: Tiling, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_TELL_SECONDS", 0.0)
    told: list[str] = []
    run(photos, network, tiling, memory(), batch_tiles=1, workers=0, tell=told.append)
    assert any("pictures/s" in line and "left" in line for line in told)


def test_processes_that_share_the_work_compute_every_picture_once(
    network: torch.nn.Module, tiling: Tiling, photos: list[Path], tmp_path: Path
) -> None:
    parts = [run(photos, network, tiling, FeatureStore(tmp_path / "store", disk_budget=1 << 30), share=(rank, 3)) for rank in range(3)]
    assert [part.computed for part in parts] == [3, 2, 2]
    assert parts[0].keys == parts[1].keys == parts[2].keys
    store = FeatureStore(tmp_path / "store")
    assert all(key in store for key in parts[0].keys.values())
