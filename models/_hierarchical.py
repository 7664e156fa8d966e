"""What image models with stages of falling resolution share: parameters bound to a stage's grid, groups by depth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from ._image import ImageBackbone, to_size


class HierarchicalBackbone(ImageBackbone):
    """Abstract image model whose stages may have parameters that depend on their grid.

    Attributes:
        smallest_side: smallest side in pixels of an image.
        bound: the grid (H, W) of each stage that has such parameters; a skeleton writes it in its constructor.
    """

    smallest_side: int
    bound: dict[int, tuple[int, int]]

    @abstractmethod
    def grids(self, img_size: Sequence[int]) -> list[tuple[int, int]]:
        """(H, W) of every stage's map for images of ``img_size`` pixels."""

    def check_side(self, img_size: Sequence[int], name: str) -> None:
        """Raise ValueError if a side is too small to leave a position at every stage."""
        if min(img_size) < self.smallest_side:
            raise ValueError(f"{name} {tuple(img_size)} is too small: sides must be at least {self.smallest_side}")

    def check_input_size(self, img_size: Sequence[int]) -> None:
        """Raise ValueError unless images of this size can be taken; see `ImageBackbone`."""
        self.check_side(img_size, "input size")
        if not self.bound:
            return
        grids = self.grids(img_size)
        for stage, grid in self.bound.items():
            if stage < len(self.stages) and grids[stage] != grid:
                raise ValueError(
                    f"input size {tuple(img_size)} gives the grid {grids[stage]} at stage {stage}, whose parameters "
                    f"are bound to {grid}: give images of {self.img_size} pixels, or call "
                    f"set_input_size({tuple(img_size)}) first"
                )

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resize every parameter that depends on the grid to images of ``img_size`` pixels.

        Mixers follow their authors' procedure where there is one, position embeddings are resampled bicubically. Must
        run before the optimizer, DDP or `torch.compile` sees the parameters. Sizes that no parameter depends on are
        only recorded.
        """
        img_size = to_size(img_size)
        self.check_side(img_size, "img_size")
        grids = self.grids(img_size)
        for i, stage in enumerate(self.stages):
            if i in self.bound and self.bound[i] != grids[i]:
                stage.set_grid_size(grids[i])
                self.bound[i] = grids[i]
        self.img_size = img_size


def stage_groups(coarse: bool, entry: str = "downsample", last: str = "norm") -> dict:
    """Regular expressions that group parameters by depth, for layer-wise learning rate decay.

    Args:
        coarse: a group for each stage instead of each block.
        entry: parts of a stage before its blocks, an alternation.
        last: parts of the head that go with the last blocks, an alternation.
    """
    blocks = [
        (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        (rf"^stages\.(\d+)\.(?:{entry})", (0,)),
        (rf"^head\.(?:{last})", (99999,)),
    ]
    return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}
