"""Distil Text Encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy_api.latest import io, ui

from ..encoder.served import ServingOptions, load_encoder
from ..runtime.comfyui import model_file
from ..runtime.errors import UserError
from ..train.presets import Wishes, check_name, fitting_family, preset_names, recipe_of, starter_prompts
from .loaded_files import diffusion_file, text_encoder_files
from .model_files import FOLDER, NO_FILE
from .show import image_of, shown

if TYPE_CHECKING:
    from ..train.recipe import Recipe
    from ..train.run_directory import RunDirectory

OF_THE_PRESET = "as in the preset"
MOST_STEPS, MOST_SEED = 100_000_000, 2**31 - 1
# Beside the runs, which share it.
RUNS, CACHE = "distilled_t5", "teacher-cache"
PRESET = "flux-overnight-16gb"


class DistilledT5Distil(io.ComfyNode):
    """Trains a student of a text encoder in the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5Distil",
            display_name="Distil Text Encoder",
            category="Distilled T5",
            description=(
                "Trains a small text encoder that makes this diffusion model draw what its large one does, and gives it when it is done. "
                "Cancel saves, the next Run continues. The trainer is that of the command."
            ),
            search_aliases=["train text encoder", "distillation", "train T5", "DistillT5 training", "student teacher"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The diffusion model to follow: of Load Diffusion Model, without LoRA. weight_dtype default: as in the preset.",
                ),
                io.Clip.Input(
                    "teacher", tooltip="The encoder to imitate: of ComfyUI's CLIP loaders (T5-XXL) or Distilled Text Encoder Loader."
                ),
                io.Combo.Input(
                    "preset",
                    options=preset_names(),
                    default=PRESET,
                    tooltip="A recipe of the pack: size of the student, resolution, batch, learning rate, steps, prompts.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=MOST_STEPS,
                    tooltip="Optimizer steps, all stages together; can change before a run continues. 0: as in the preset.",
                ),
                io.String.Input(
                    "prompts",
                    default=starter_prompts(),
                    multiline=True,
                    placeholder="One prompt on each line. Empty: the preset's own prompts.",
                    tooltip="What is trained on, one prompt on each line; thousands are better than these. Empty: the preset's own.",
                ),
                *_run_inputs(),
            ],
            outputs=[
                io.Clip.Output(display_name="CLIP", tooltip="The trained encoder, as Distilled Text Encoder Loader gives it."),
                io.String.Output(display_name="report", tooltip="The encoder's file, how far it came, and the folder of the run."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, teacher: Any, preset: str, steps: int, prompts: str, name: str, seed: int, preview_vae: str = OF_THE_PRESET
    ) -> io.NodeOutput:
        from ..train.in_graph import distil, newest_image, outcome

        run, recipe, content = _run_and_recipe(model, teacher, preset, prompts, preview_vae, name=name, seed=seed, steps=steps)
        path = distil(recipe, run, content)
        companions = {name: str(model_file(file, FOLDER)) for name, file in recipe.teacher.companions.items()}
        options = ServingOptions(recipe.family.name, embedding_folders=tuple(folder_paths.get_folder_paths("embeddings")))
        served, sheet = load_encoder(str(path), companions, options), newest_image(run)
        report = "\n".join([served.info, *outcome(run), f"run: {run.path}"])
        shows = ui.PreviewText(report).as_dict() if sheet is None else shown(image_of(sheet), report, cls)
        return io.NodeOutput(served.clip, report, ui=shows)


def _run_inputs() -> list[io.Input]:
    """The inputs that name a run and say how it is shown."""
    return [
        io.String.Input(
            "name",
            default="my_student",
            tooltip="The encoder becomes models/text_encoders/NAME.safetensors, the run is in output/distilled_t5/NAME.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MOST_SEED,
            # Another seed after each run would be another run.
            control_after_generate=False,
            tooltip="Decides every random draw: the same seed, the same student.",
        ),
        io.Combo.Input(
            "preview_vae",
            display_name="preview VAE",
            options=[OF_THE_PRESET, NO_FILE, *folder_paths.get_filename_list("vae")],
            default=OF_THE_PRESET,
            advanced=True,
            optional=True,
            tooltip="The VAE of the images that are shown while the student is trained; none: no images.",
        ),
    ]


def _run_and_recipe(
    model: Any, teacher: Any, preset: str, prompts: str, preview_vae: str, **chosen: Any
) -> tuple[RunDirectory, Recipe, str]:
    """The folder of the run, which is not made yet, the recipe that these inputs say, and the content of its file of prompts."""
    from ..train.in_graph import begun, checked_prompts
    from ..train.run_directory import RunDirectory

    if model is None or teacher is None:
        raise UserError(
            "MODEL or teacher is not connected.", "connect Load Diffusion Model, and a CLIP loader or Distilled Text Encoder Loader."
        )
    check_name(chosen["name"])
    family = fitting_family(preset, model.model)
    (diffusion_model, dtype), (t5, companions) = diffusion_file(model), text_encoder_files(teacher, family)
    vae = {OF_THE_PRESET: None, NO_FILE: ""}.get(preview_vae, preview_vae)
    run = RunDirectory(Path(folder_paths.get_output_directory(), RUNS, chosen["name"]))
    text, count = checked_prompts(run, prompts) if prompts.strip() else ("", 0)
    path, cache = run.prompts if text else None, run.path.with_name(CACHE)
    wishes = Wishes(diffusion_model, dtype, t5, companions, vae=vae, prompts=path, prompt_count=count, cache=cache, **chosen)
    return run, recipe_of(preset, wishes, *begun(run)), text
