"""A run with kept features is the run without them, wherever they are kept, and damage is computed again."""

from pathlib import Path

import pytest
import torch
from test_loop import losses, run, write_recipe

from intervale.core.errors import UserError
from intervale.model.features import FeatureStore

STEADY = ("lora.dropout=0", "train.max_steps=3")


def trained(folder: Path, tiny: Path, plates: Path, *overrides: str, said: list[str] | None = None) -> list[float]:
    folder.mkdir()
    run(write_recipe(folder, tiny, plates), *STEADY, *overrides, said=said)
    return losses(folder / "run")


@pytest.mark.parametrize("frozen", [(), ("train.projector=frozen",)], ids=["tower", "projected"])
def test_kept_in_memory_or_on_the_disk_is_live(frozen: tuple[str, ...], tmp_path: Path, tiny: Path, plates: Path) -> None:
    store = f"data.features_dir={tmp_path / 'store'}"
    live = trained(tmp_path / "live", tiny, plates, "train.features=live", *frozen)
    memory = trained(tmp_path / "memory", tiny, plates, "train.features=cache", *frozen)
    disk = trained(tmp_path / "disk", tiny, plates, store, *frozen)
    assert memory == pytest.approx(live, rel=1e-5)
    assert disk == memory
    assert list((tmp_path / "store").rglob("*.feat"))


def test_a_second_run_finds_what_the_first_computed_and_mends_what_was_damaged(tmp_path: Path, tiny: Path, plates: Path) -> None:
    store = f"data.features_dir={tmp_path / 'store'}"
    first = trained(tmp_path / "first", tiny, plates, store)
    entries = sorted((tmp_path / "store").rglob("*.feat"))
    said: list[str] = []
    assert trained(tmp_path / "second", tiny, plates, store, said=said) == first
    assert any(f"{len(entries)} of them kept already" in line for line in said)
    damaged = bytearray(entries[0].read_bytes())
    damaged[-1] ^= 1
    entries[0].write_bytes(damaged)
    said = []
    assert trained(tmp_path / "third", tiny, plates, store, said=said) == pytest.approx(first, rel=1e-5)
    assert any("damaged feature entry" in line for line in said)


def test_cache_is_refused_where_nothing_has_room(tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intervale.train.feature_cache.free_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"do not fit"):
        trained(tmp_path / "run", tiny, plates, "train.features=cache", "data.features_gib=0")


def test_auto_goes_to_the_disk_when_memory_is_short_and_says_so(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intervale.train.feature_cache.free_memory", lambda device: 1000)
    monkeypatch.setenv("INTERVALE_CACHE", str(tmp_path / "store"))
    said: list[str] = []
    trained(tmp_path / "run", tiny, plates, said=said)
    assert any("kept on the disk" in line for line in said)
    assert list((tmp_path / "store").rglob("*.feat"))


def test_what_was_used_longest_ago_makes_room_in_a_full_folder(tmp_path: Path, tiny: Path, plates: Path) -> None:
    folder = tmp_path / "store"
    FeatureStore(folder, disk_budget=1 << 30).put("0" * 40, torch.zeros(1, 1, 254_900))  # all but 326 bytes of what is allowed below
    trained(tmp_path / "run", tiny, plates, f"data.features_dir={folder}", "data.features_gib=0.00095")
    entries = [path.stem for path in folder.rglob("*.feat")]
    assert entries
    assert "0" * 40 not in entries
