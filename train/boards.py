"""Where a run's numbers and images also go: TensorBoard and Weights & Biases, each where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..runtime.disk import replace_file
from ..runtime.optional import needed, pip_install

if TYPE_CHECKING:
    from PIL import Image

    from .recipe import Recipe
    from .run_directory import RunDirectory

PROJECT = "distilled-t5"
NO_TENSORBOARD = "TensorBoard is not installed; `pip install tensorboard` adds curves. metrics.jsonl and page.html have the same numbers."
# What opening a board raises: the disk, the network or an account; a package that does not suit those beside it.
BROKEN = (OSError, ImportError, AttributeError, TypeError)
log = logging.getLogger(__name__)


class Board(Protocol):
    """Receives what the run reports. OSError ends it and not the run; any other exception stops the run, whose state is not saved."""

    def numbers(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """The numbers of a step ("train") or of a validation ("validation") by name; some are nested by name once."""

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """An image that the run has made."""

    def close(self) -> None:
        """The run has ended."""


def open_boards(run: RunDirectory, recipe: Recipe, step: int, quiet: bool = False) -> list[Board]:
    """TensorBoard if it is installed, and Weights & Biases if the recipe says so. One that cannot be opened is left out, with a warning.

    quiet: whether nothing is said of TensorBoard where it is missing.
    TensorBoard replaces what follows `step`; Weights & Biases keeps the points that it has, and takes none of those steps again.
    Raises ValueError with the pip command if wandb is wanted and missing.
    """
    wanted: list[tuple[str, Callable[[], Board], str]] = []
    if importlib.util.find_spec("tensorboard") is not None:
        wanted.append(("TensorBoard", lambda: TensorBoard(run, step), pip_install("--upgrade tensorboard")))
    elif not quiet:
        log.info(NO_TENSORBOARD)
    if recipe.report.wandb:
        wanted.append(("Weights & Biases", lambda: WeightsAndBiases(run, recipe), "`wandb login`, or set WANDB_MODE=offline"))
    boards: list[Board] = []
    for name, open_board, remedy in wanted:
        try:
            boards.append(open_board())
        except BROKEN as error:  # noqa: PERF203 (each board may fail)
            log.warning("%s cannot be opened (%s); the run continues without it. What to do: %s.", name, error, remedy)
    return boards


class TensorBoard:
    """Curves and images in RUN/tensorboard."""

    def __init__(self, run: RunDirectory, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)

    def numbers(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Add a point to the curve of each number."""
        for name, value in flat(values):
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """Add an image to those of its name."""
        import numpy

        self._writer.add_image(name, numpy.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


class WeightsAndBiases:
    """One run of Weights & Biases, which a resumed run continues: its id is in RUN/wandb-id. Its own files are in RUN/wandb."""

    def __init__(self, run: RunDirectory, recipe: Recipe) -> None:
        self._wandb = needed("wandb", "wandb", "report.wandb = true")
        place = run.path / "wandb-id"
        if not place.is_file():
            replace_file(place, secrets.token_hex(4).encode())
        with self._failing():
            self._run = self._wandb.init(
                project=PROJECT,
                name=recipe.name,
                id=place.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(run.path),
                settings=self._wandb.Settings(console="off"),  # train.log has the output
                config=recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
            )

    def numbers(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Add a point to the curve of each number."""
        with self._failing():
            self._run.log({f"{kind}/{name}": value for name, value in flat(values)}, step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """Add an image to those of its name."""
        with self._failing():
            self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Send what is not sent yet."""
        with self._failing():
            self._run.finish()

    @contextlib.contextmanager
    def _failing(self) -> Any:
        try:
            yield
        except self._wandb.Error as error:
            raise OSError(str(error)) from error


class Boards:
    """Several boards; one that fails is closed, with a warning, and the run continues."""

    def __init__(self, boards: list[Board]) -> None:
        self._boards = boards

    def numbers(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Give the numbers to every board."""
        self._each(lambda board: board.numbers(step, kind, values))

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """Give the image to every board."""
        self._each(lambda board: board.image(step, name, picture))

    def close(self) -> None:
        """Close every board."""
        self._each(lambda board: board.close())
        self._boards = []

    def _each(self, report: Callable[[Board], None]) -> None:
        for board in list(self._boards):
            try:
                report(board)
            except OSError as error:  # noqa: PERF203 (each board may fail)
                self._boards.remove(board)
                log.warning("%s cannot be written to (%s); the run continues without it.", type(board).__name__, error)


def flat(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The finite numbers by name, nested ones as `name/part`."""
    pairs = [(name, value) for name, value in values.items() if not isinstance(value, Mapping)]
    pairs += [(f"{name}/{part}", value) for name, nested in values.items() if isinstance(nested, Mapping) for part, value in nested.items()]
    return [(name, value) for name, value in pairs if math.isfinite(value)]
