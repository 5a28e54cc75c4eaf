import numpy as np
import pytest
from PIL import Image

from intervale.data.tiling import Tiling, choose_grid, cut_tiles


# Sizes and counts from the official code (shared reference, formats.md), max 12.
@pytest.mark.parametrize(
    ("size", "grid", "tiles"),
    [
        ((448, 448), (1, 1), 1),
        ((633, 633), (1, 1), 1),
        ((634, 634), (2, 2), 5),
        ((1000, 1000), (3, 3), 10),
        ((1024, 768), (4, 3), 13),
        ((1920, 1080), (4, 2), 9),
        ((500, 333), (3, 2), 7),
    ],
)
def test_grids_are_the_official_ones(size: tuple[int, int], grid: tuple[int, int], tiles: int) -> None:
    assert choose_grid(*size, Tiling()) == grid
    assert Tiling().tiles_of(*size) == tiles


@pytest.mark.parametrize("most", [1, 2, 6, 12, 24, 40])
def test_grids_equal_transformers_own_port(most: int) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    tiling = Tiling(max_tiles=most)
    sizes = [*np.random.default_rng(most).integers(1, 4000, (300, 2)).tolist(), [640, 640], [1280, 720], [1024, 1024], [1, 20000], [1, 1]]
    for width, height in sizes:
        assert choose_grid(width, height, tiling) == tuple(get_optimal_tiled_canvas((height, width), (448, 448), 1, most))


def test_tiles_are_row_major_with_the_thumbnail_last() -> None:
    size = 8
    tiling = Tiling(tile_size=size, max_tiles=6)
    picture = Image.new("RGB", (24, 16))
    for number in range(6):
        column, row = number % 3, number // 3
        picture.paste((40 * number + 10,) * 3, (column * 8, row * 8, column * 8 + 8, row * 8 + 8))
    tiles = cut_tiles(picture, tiling)
    assert tiles.shape == (7, size, size, 3)
    assert [int(tile[4, 4, 0]) for tile in tiles[:6]] == [10, 50, 90, 130, 170, 210]
    assert np.array_equal(tiles[6], np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)))


def test_pixels_equal_transformers_own_processor() -> None:
    import torch
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    from intervale.data.tiling import IMAGENET_MEAN, IMAGENET_STD
    from intervale.model.forward import normalise

    processor = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, crop_to_patches=True, max_patches=6
    )
    noise = np.random.default_rng(1).integers(0, 255, (150, 260, 3), np.uint8)
    theirs = torch.as_tensor(np.asarray(processor(Image.fromarray(noise), return_tensors="np")["pixel_values"]))
    ours = normalise(torch.from_numpy(cut_tiles(Image.fromarray(noise), Tiling(tile_size=56, max_tiles=6))), torch.float32)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-6
