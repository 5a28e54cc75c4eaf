"""What a user names, as a desk: which models answer, under which names, and what does not fit together."""

import asyncio
import shutil
from pathlib import Path

import pytest

from intervale.core.errors import UserError
from intervale.engine import desks
from intervale.engine.api import ChatTurn, Request, Sampling
from intervale.engine.desks import default_tiles, local_desk, name_of, short_path
from intervale.engine.local import LocalEngine, answer
from intervale.engine.scheduler import Scheduler
from intervale.model.load import load_model
from intervale.model.presets import init_model

TURNS = (ChatTurn("user", ("什么菜?",)),)


def said(desk: Scheduler, model: str) -> str:
    async def run() -> str:
        return "".join([piece.text async for piece in desk.answer(Request(TURNS, Sampling(max_new_tokens=12), model))])

    return asyncio.run(run())


def alone(folder: Path) -> str:
    return answer(LocalEngine(load_model(folder, device="cpu")), Request(TURNS, Sampling(max_new_tokens=12)))[0]


def test_a_run_brings_its_base_along_however_it_is_named(run_folder: Path, tiny: Path) -> None:
    for words in ((str(run_folder),), (str(run_folder), str(tiny)), (str(tiny), None, str(run_folder))):
        desk = local_desk(*words, device="cpu")
        assert desk.models == ("checkpoint", "tiny")
        assert said(desk, "checkpoint") == said(desk, "") == alone(run_folder)
        assert said(desk, "tiny") == alone(tiny)
        desk.close()


def test_two_plain_models_answer_side_by_side_and_same_names_are_told_apart(tiny: Path, tmp_path: Path) -> None:
    init_model(tmp_path / "tiny", "tiny", seed=4)
    desk = local_desk(str(tiny), str(tmp_path / "tiny"), device="cpu")
    assert desk.models == ("tiny", "tiny-base")
    assert said(desk, "tiny") == alone(tiny)
    assert said(desk, "tiny-base") == alone(tmp_path / "tiny")
    desk.close()


def test_what_does_not_fit_together_is_refused(run_folder: Path, tiny: Path, tmp_path: Path) -> None:
    init_model(tmp_path / "other", "tiny", seed=4)
    with pytest.raises(UserError, match="not trained on"):
        local_desk(str(run_folder), str(tmp_path / "other"), device="cpu")
    with pytest.raises(UserError, match="not a training run"):
        local_desk(str(tiny), None, str(tmp_path / "other"), device="cpu")
    with pytest.raises(UserError, match="together"):
        local_desk(str(tiny), str(tiny), str(run_folder), device="cpu")


def test_names_are_the_last_part_and_tiles_are_fewer_on_a_cpu_only_where_they_are_large(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name_of("OpenGVLab/InternVL2-2B") == "InternVL2-2B"
    assert name_of(f"{tiny}/") == "tiny"
    for path in ("quickstart/run", "quickstart/run/checkpoints/step-00000064", "runs/quickstart"):
        (tmp_path / path).mkdir(parents=True)
        assert name_of(str(tmp_path / path)) == "quickstart"
    assert short_path(str(tmp_path / "quickstart/run")) == "quickstart/run"
    assert default_tiles(str(tiny), "cpu") is None
    shutil.copytree(tiny, tmp_path / "large")
    config = tmp_path / "large" / "config.json"
    config.write_text(
        config.read_text()
        .replace('"force_image_size": 56', '"force_image_size": 448')
        .replace('"max_dynamic_patch": 4', '"max_dynamic_patch": 12')
    )
    assert default_tiles(str(tmp_path / "large"), "cpu") == desks.CPU_TILES
