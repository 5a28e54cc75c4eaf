"""A corpus is its items whether they are read, indexed, or lie in archives; a mix is numbered source after source."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import draw_plates
from intervale.core.errors import UserError
from intervale.core.files import inside
from intervale.core.records import Record, read_records
from intervale.data.corpus import Corpus, SourceSpec, open_corpus
from intervale.data.images import PictureError, load_picture, picture_size
from intervale.data.pictures import hash_pictures, pictures_of


def opened(tmp_path: Path, *specs: SourceSpec, index: str = "auto") -> Corpus:
    return open_corpus(specs, index, lambda text: None, tmp_path / "cache")


def write_tar(path: Path, records: list[Record], named: bool = True) -> None:
    """The records as a WebDataset: KEY.json and KEY.<n>.png."""
    with tarfile.open(path, "w") as archive:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for number, record in enumerate(records):
            item: dict[str, Any] = {"messages": [{"role": m.role, "content": m.content} for m in record.messages], "id": record.id}
            names = [f"{at}.png" for at in range(len(record.images))]
            if named:
                item["images"] = names
            for name, image in zip(names, record.images, strict=True):
                add(f"a/{number:04}.{name}", (record.root / image).read_bytes())
            add(f"a/{number:04}.json", json.dumps(item).encode())


def write_parquet(path: Path, records: list[Record], inside_rows: bool, group: int = 3) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = []
    for record in records:
        images: list[Any] = list(record.images)
        if inside_rows:
            images = [{"bytes": (record.root / image).read_bytes(), "path": image} for image in record.images]
        messages = [{"role": m.role, "content": m.content} for m in record.messages]
        rows.append({"messages": messages, "images": images, "id": record.id, "tags": json.dumps(record.tags), "answer": record.answer})
        rows[-1]["choices"] = list(record.choices)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return read_records(draw_plates(tmp_path_factory.mktemp("corpus"), 10))


def pixels(record: Record) -> list[bytes]:
    return [load_picture(inside(record.root, image, record.where)).tobytes() for image in record.images]


def test_reading_and_indexing_give_the_same_items_digest_and_order(tmp_path: Path, records: list[Record]) -> None:
    spec = SourceSpec(str(records[0].root / "train.jsonl"))
    read, indexed = opened(tmp_path, spec), opened(tmp_path, spec, index="on")
    assert (read.indexed, indexed.indexed) == (False, True)
    assert list(read) == list(indexed) == records
    assert read.digest == indexed.digest
    assert read[2:5] == indexed[2:5] == records[2:5]
    for together in (False, True):
        for step in range(6):
            assert np.array_equal(read.order(7, together).step(4, step), indexed.order(7, together).step(4, step))


def test_groups_are_the_pictures_and_text_alone_is_alone(tmp_path: Path) -> None:
    draw_plates(tmp_path, 2)
    names = (["images/train-0.png"], [], ["images/train-1.png"], ["images/train-0.png"], [])
    items = [
        {"messages": [{"role": "user", "content": "<image>" * len(name) + "?"}, {"role": "assistant", "content": "a"}], "images": name}
        for name in names
    ]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, items)))
    spec = SourceSpec(str(tmp_path / "g.jsonl"))
    for index in ("off", "on"):
        found = opened(tmp_path, spec, index=index).groups()
        assert len(set(found)) == 4
        assert found[0] == found[3]
        assert list(opened(tmp_path, spec, index=index).first_of_pictures()) == [0, 2]


@pytest.mark.parametrize("named", [True, False])
def test_a_tar_holds_the_items_and_their_pictures(tmp_path: Path, records: list[Record], named: bool) -> None:
    for number in (0, 1):
        write_tar(tmp_path / f"s-{number}.tar", records[5 * number : 5 * number + 5], named)
    corpus = opened(tmp_path, SourceSpec(str(tmp_path / "s-*.tar")))
    assert [record.id for record in corpus] == [record.id for record in records]
    assert [record.messages for record in corpus] == [record.messages for record in records]
    assert [pixels(record) for record in corpus] == [pixels(record) for record in records]
    assert "s-1.tar:2" in corpus[6].where
    digests = hash_pictures(pictures_of(list(corpus)), lambda text: None)
    assert sorted(map(str, digests.values())) == sorted(map(str, hash_pictures(pictures_of(records), lambda text: None).values()))


@pytest.mark.parametrize("inside_rows", [True, False])
def test_a_parquet_table_holds_the_items_and_their_pictures(tmp_path: Path, records: list[Record], inside_rows: bool) -> None:
    path = (tmp_path if inside_rows else records[0].root) / "t.parquet"
    write_parquet(path, records, inside_rows)
    corpus = opened(tmp_path, SourceSpec(str(path)))
    for found, record in zip(corpus, records, strict=True):
        assert (found.id, found.messages, found.choices, found.answer, found.tags) == (
            record.id,
            record.messages,
            record.choices,
            record.answer,
            record.tags,
        )
    assert [pixels(record) for record in corpus] == [pixels(record) for record in records]
    assert sorted(corpus.order(1).epoch(0)) == list(range(10))


def test_rows_of_a_group_stay_near_each_other(tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "t.parquet", records, True, group=2)
    monkeypatch.setattr("intervale.data.corpus.GROUPS_KEPT", 1)  # one group at a time
    order = opened(tmp_path, SourceSpec(str(tmp_path / "t.parquet"))).order(5).epoch(0)
    assert [int(item) // 2 for item in order[::2]] == [int(item) // 2 for item in order[1::2]]


def test_a_picture_that_its_archive_lost_is_told(tmp_path: Path, records: list[Record]) -> None:
    write_tar(tmp_path / "s.tar", records[:3])
    corpus = opened(tmp_path, SourceSpec(str(tmp_path / "s.tar")))
    last = corpus[2]
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:2048])
    with pytest.raises(PictureError, match=r"s\.tar:3: .*shorter than its index"):
        picture_size(inside(last.root, last.images[0], last.where), f"{last.where}: {last.images[0]}")


def test_a_name_that_only_looks_stored_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").write_bytes(b"x" * 100)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="out of"):
        inside(tmp_path / "data", "link/@0+10/a.png", "here")


def test_archives_with_faults_are_refused_by_name(tmp_path: Path, records: list[Record]) -> None:
    (tmp_path / "no.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="not an uncompressed tar"):
        opened(tmp_path, SourceSpec(str(tmp_path / "no.tar")))
    with tarfile.open(tmp_path / "half.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match=r"sample 1 \(a\): 0 JSON members"):
        opened(tmp_path, SourceSpec(str(tmp_path / "half.tar")))
    (tmp_path / "no.parquet").write_bytes(b"PAR1 but no more")
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="not a parquet file"):
        opened(tmp_path, SourceSpec(str(tmp_path / "no.parquet")))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="needs pyarrow") as caught:
        opened(tmp_path, SourceSpec(str(tmp_path / "t.parquet")))
    assert "intervale[parquet]" in caught.value.fix


def test_a_mix_numbers_source_after_source_and_knows_its_weights(tmp_path: Path, records: list[Record]) -> None:
    other = draw_plates(tmp_path, 4, "other.jsonl", seed=2)
    specs = SourceSpec(str(records[0].root / "train.jsonl"), 0.5), SourceSpec(str(other), 2)
    for index in ("off", "on"):
        corpus = opened(tmp_path, *specs, index=index)
        assert [record.id for record in corpus] == [record.id for record in records] + ["p0", "p1", "p2", "p3"]
        epoch = corpus.order(3).epoch(0)
        assert (len(epoch), int((epoch >= 10).sum())) == (13, 8)
        assert len({int(group) for group in corpus.groups()}) == 14
    assert opened(tmp_path, *specs).digest != opened(tmp_path, specs[0], SourceSpec(str(other), 1)).digest
    assert list(corpus.weights_of(np.array([0, 12]), 0.5, 100)) == [
        100 + sum(len(m.content.encode()) for m in record.messages) / 2 for record in (corpus[0], corpus[12])
    ]


def test_a_pattern_without_files_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file fits"):
        opened(tmp_path, SourceSpec(str(tmp_path / "x-*.tar")))
    with pytest.raises(UserError, match="is a folder"):
        opened(tmp_path, SourceSpec(str(tmp_path)))


def hand_written(path: Path, records: list[Record]) -> None:
    """Lines with another order of keys and other spaces than ours, and without an id."""
    lines = [
        json.dumps({"images": list(r.images), "messages": [{"content": m.content, "role": m.role} for m in r.messages]}, indent=None)
        for r in records
    ]
    path.write_text("\n".join(lines) + "\n")


def test_files_by_another_hand_are_the_same_items_read_or_indexed(tmp_path: Path, records: list[Record]) -> None:
    root = records[0].root
    for number in (0, 1):
        hand_written(root / f"hand-{number}.jsonl", records[5 * number : 5 * number + 5])
    for specs in (
        [SourceSpec(str(root / "hand-?.jsonl"))],
        [SourceSpec(str(root / "hand-0.jsonl"), 2), SourceSpec(str(root / "train.jsonl"))],
    ):
        read, indexed = (opened(tmp_path, *specs, index=index) for index in ("off", "on"))
        assert list(read) == list(indexed)
        if len(specs) == 1:
            assert [record.id for record in read] == [str(number) for number in range(1, 11)]
        assert read.digest != indexed.digest
        assert read.is_named(indexed.digest)
        assert indexed.is_named(read.digest)
        assert not read.is_named("0" * 16)
    more = opened(tmp_path, SourceSpec(str(root / "hand-0.jsonl")), index="on")
    assert not more.is_named(opened(tmp_path, SourceSpec(str(root / "hand-1.jsonl"))).digest)


def test_a_file_that_is_gone_while_its_items_are_read_is_told(tmp_path: Path, records: list[Record]) -> None:
    path = tmp_path / "gone.jsonl"
    hand_written(path, records)
    corpus = opened(tmp_path, SourceSpec(str(path)), index="on")
    path.unlink()
    with pytest.raises(UserError, match=r"gone\.jsonl:3: cannot be read any more"):
        corpus[2]


def test_a_tar_that_was_cut_anywhere_is_refused(tmp_path: Path, records: list[Record]) -> None:
    """At the end of a sample too, where tarfile sees nothing wrong and the samples behind it would be missed by nobody."""
    write_tar(tmp_path / "whole.tar", records[:3])
    whole = (tmp_path / "whole.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    cuts = list(range(512, end, 512))
    with tarfile.open(tmp_path / "whole.tar") as archive:
        starts = [member.offset for member in archive if member.name.endswith(".json")]
    assert set(starts[1:]) <= set(cuts)
    for number, size in enumerate([*cuts, end - 1]):
        path = tmp_path / f"cut-{number}.tar"
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut-\d+\.tar: "):
            opened(tmp_path, SourceSpec(str(path)))
    assert len(opened(tmp_path, SourceSpec(str(tmp_path / "whole.tar")))) == 3
