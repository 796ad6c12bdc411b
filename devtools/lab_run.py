"""One run of the lab in a process of its own: train a student, evaluate it. What is done is left alone."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.disk import replace_file
from .comfyui.ending import interrupt_when_asked
from .commands import ROOT, run_all


@dataclass(frozen=True)
class Run:
    """The folder of an arm with a seed; its name has a digest of what decides it, so that a changed arm is another run.

    shipped: the file of a student that is there already.
    """

    folder: Path
    arm: str
    seed: int
    shipped: Path | None = None

    @property
    def trained(self) -> Path:
        """The file that the trainer writes."""
        return self.folder / "models" / "text_encoders" / f"{self.arm}.safetensors"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def done(self) -> bool:
        return (self.evaluation / "results.json").is_file()

    @property
    def failure(self) -> Path:
        """Why the last try failed."""
        return self.folder / "failed.txt"

    def prepare(self, recipe: str, overrides: tuple[str, ...], suite: Path, teacher: Path, comfyui: Path) -> list[str | Path]:
        """Write down what the run's process has to do, and return the command that starts it."""
        sets = [part for setting in overrides for part in ("--set", setting)]
        run = self.folder / "runs" / "train"
        train = [ROOT / "train", recipe, "--run", run, "--comfyui", comfyui, *sets]
        student = f"{self.arm}={self.trained}"
        evaluate = evaluation(suite, self.evaluation, comfyui, "--student", student)
        job = {"arm": self.arm, "seed": self.seed, "teacher": teacher, "train": train, "evaluate": evaluate}
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.shipped:
            self.trained.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.trained, self.shipped.read_bytes())
        replace_file(self.folder / "job.json", json.dumps(job, indent=1, default=str).encode())
        return ["-m", "distilled_t5.devtools.lab_run", self.folder]


def evaluation(suite: Path, out: Path, comfyui: Path, *more: str) -> list[str | Path]:
    """The command that evaluates a suite."""
    return [ROOT / "evaluate" / "__main__.py", suite, *more, "--out", out, "--comfyui", comfyui, "--", "--cpu"]


def perform(run: Run, job: dict[str, Any]) -> None:
    """Train and evaluate; what fails is written down, since the lab goes on with its other arms."""
    try:
        if not run.trained.is_file():
            resume = ["--resume"] if any(run.folder.glob("runs/train/checkpoints/step-*")) else []
            run_all([[*job["train"], *resume, "--", "--cpu", "--base-directory", run.folder]])
        for part in ("images", "scores"):
            if not (run.evaluation / part).is_dir():
                shutil.copytree(Path(job["teacher"], part), run.evaluation / part)
        run_all([job["evaluate"]])
        run.failure.unlink(missing_ok=True)
    except RuntimeError as error:
        replace_file(run.failure, str(error).encode())
        print(f"{run.arm}, seed {run.seed}: {error}\nThe lab goes on with its other arms.", file=sys.stderr)


def main() -> None:
    """Perform the run in the folder on the command line."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    interrupt_when_asked()
    try:
        perform(Run(folder, job["arm"], job["seed"]), job)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
