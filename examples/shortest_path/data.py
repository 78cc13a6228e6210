"""Terrain maps: a seeded generator of images, the costs of their cells, and cheapest paths across them.

A map is a grid of cells, each of one terrain; its image has PIXELS × PIXELS pixels for each cell. Elevation and
moisture are smooth random fields, from which terrain follows: water lies lowest, sand beside it, rock highest, and
between them meadow where it is dry and forest where it is moist. Meadow and forest have one mean colour and differ
in texture only. Borders between terrains wander by a pixel or so, every map has its own light, and pixels have noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from .grid import GridPaths

__all__ = ["COSTS", "PIXELS", "TERRAINS", "Maps", "generate_maps"]

PIXELS = 8
TERRAINS = ("meadow", "sand", "forest", "water", "rock")
COSTS = np.array([1.0, 2.0, 4.0, 7.0, 10.0])
MEADOW, SAND, FOREST, WATER, ROCK = range(len(TERRAINS))
_COLOURS = np.array(
    [[0.36, 0.52, 0.24], [0.80, 0.71, 0.47], [0.36, 0.52, 0.24], [0.22, 0.40, 0.62], [0.52, 0.49, 0.46]]
)
_PIXEL_NOISE = 0.03
_TIE_BREAK = 1e-9  # costs are whole numbers: paths of the same cost are chosen from at random, others stay in order


@dataclass(frozen=True)
class Maps:
    """Maps of one size.

    Args:
        images: (B, 3, PIXELS · height, PIXELS · width) float32 in [0, 1].
        terrain: (B, height, width) int8, positions in ``TERRAINS``.
        costs: (B, height, width) float64, the true costs of the cells.
        paths: (B, height, width) float64, the indicator of a cheapest path; where there are several, of a random one.
    """

    images: NDArray[np.float32]
    terrain: NDArray[np.int8]
    costs: NDArray[np.float64]
    paths: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.images)


def generate_maps(size: int, height: int, width: int, seed: tuple[int, ...]) -> Maps:
    """Generate maps; the same arguments give the same maps, and fewer maps are the first of more.

    Args:
        size: number of maps.
        height, width: of a map, in cells.
        seed: any nonnegative integers; other ones give independent maps.

    Raises:
        ValueError: a map would have fewer than 2 cells a side.
    """
    if min(height, width) < 2:
        raise ValueError(f"maps of {height} × {width} cells are too small; both sides need at least 2.")
    find_path = GridPaths(height, width)
    images = np.empty((size, 3, PIXELS * height, PIXELS * width), dtype=np.float32)
    terrain = np.empty((size, height, width), dtype=np.int8)
    paths = np.empty((size, height, width))
    for index in range(size):
        generator = np.random.default_rng((*seed, index))
        terrain[index] = _terrain(height, width, generator)
        images[index] = _image(terrain[index], generator)
        paths[index] = find_path(COSTS[terrain[index]] + generator.uniform(0, _TIE_BREAK, (height, width)))
    return Maps(images, terrain, COSTS[terrain], paths)


def _smooth(height: int, width: int, scale: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """A stationary random field with mean 0 and deviation 1 over the map, correlated over about ``scale`` pixels."""
    field = gaussian_filter(generator.standard_normal((height, width)), scale, mode="wrap")
    return (field - field.mean()) / field.std()


def _terrain(height: int, width: int, generator: np.random.Generator) -> NDArray[np.int8]:
    elevation = _smooth(height, width, 1.2, generator) + 0.15 * generator.standard_normal((height, width))
    moisture = _smooth(height, width, 1.0, generator)
    low, sandy, high = np.quantile(elevation, np.cumsum(generator.uniform([0.1, 0.08, 0.3], [0.25, 0.2, 0.4])))
    terrain = np.where(moisture > generator.uniform(-0.5, 0.3), FOREST, MEADOW)
    terrain[elevation < sandy] = SAND
    terrain[elevation < low] = WATER
    terrain[elevation > high] = ROCK
    return terrain.astype(np.int8)


def _image(terrain: NDArray[np.int8], generator: np.random.Generator) -> NDArray[np.float32]:
    height, width = (PIXELS * side for side in terrain.shape)
    row, column = np.indices((height, width))
    shifted = [
        np.clip(np.rint(place + 0.8 * _smooth(height, width, 2.0, generator)), 0, side - 1).astype(int) // PIXELS
        for place, side in ((row, height), (column, width))
    ]
    texture = np.zeros((len(TERRAINS), height, width))
    grain = generator.standard_normal((height, width))
    phase = generator.uniform(0, 2 * np.pi, 2)
    texture[MEADOW] = 0.03 * _smooth(height, width, 2.0, generator)
    texture[SAND] = 0.05 * np.sin(0.5 * row + 0.9 * column + phase[0])  # ripples
    texture[FOREST] = 0.11 * _smooth(height, width, 0.8, generator)  # crowns of trees
    texture[WATER] = 0.06 * np.sin(1.3 * row + _smooth(height, width, 3.0, generator) + phase[1])  # waves
    texture[ROCK] = 0.07 * grain
    pixels = terrain[shifted[0], shifted[1]]
    image = _COLOURS[pixels] + np.take_along_axis(texture, pixels[None].astype(int), 0)[0][..., None]
    # Light: its strength and colour, and a slope of it across the map.
    across = generator.uniform(-0.1, 0.1, 2)
    light = 1 + across[0] * (2 * row / height - 1) + across[1] * (2 * column / width - 1)
    image *= light[..., None] * generator.uniform(0.8, 1.15) * generator.uniform(0.93, 1.07, 3)
    image += _PIXEL_NOISE * generator.standard_normal(image.shape)
    return np.clip(image, 0, 1).transpose(2, 0, 1).astype(np.float32)
