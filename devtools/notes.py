"""What the notes in the example workflows say, and where every model file named there comes from."""

from dataclasses import dataclass

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class ModelFile:
    """Where a model file is to be had, the folder below models/ it belongs into, and a remark for the reader."""

    url: str
    folder: str
    remark: str


FILES: dict[str, ModelFile] = {
    "distilled_t5_base.safetensors": ModelFile(
        f"{HUB}/LifuWang/DistillT5/resolve/main/model.safetensors", "text_encoders", "0.26 GB; comes as model.safetensors: **rename it**"
    ),
    "clip_l.safetensors": ModelFile(f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors", "text_encoders", "0.25 GB"),
    "t5xxl_fp16.safetensors": ModelFile(
        f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors", "text_encoders", "9.8 GB; only for this comparison"
    ),
    "flux1-dev.safetensors": ModelFile(
        f"{HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors", "diffusion_models", "23.8 GB; non-commercial licence"
    ),
    "flux1-schnell.safetensors": ModelFile(
        f"{HUB}/Comfy-Org/flux1-schnell/resolve/main/flux1-schnell.safetensors", "diffusion_models", "23.8 GB; Apache-2.0"
    ),
    "ae.safetensors": ModelFile(
        f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors", "vae", "0.34 GB"
    ),
    "FLUX-dev-lora-add_details.safetensors": ModelFile(
        f"{HUB}/Shakker-Labs/FLUX.1-dev-LoRA-add-details/resolve/main/FLUX-dev-lora-add_details.safetensors",
        "loras",
        "0.69 GB; any Flux LoRA will do",
    ),
    "flux-canny-controlnet-v3.safetensors": ModelFile(
        f"{HUB}/XLabs-AI/flux-controlnet-collections/resolve/main/flux-canny-controlnet-v3.safetensors", "controlnet", "1.5 GB"
    ),
}

FOX = "A red fox in a blue scarf sits on a park bench and reads a newspaper, morning light, autumn leaves, 35 mm photograph"
LIGHTHOUSE = "A white lighthouse on a cliff above a stormy green sea, a small red boat below, oil painting with visible brush strokes"
WATCHMAKER = "An old watchmaker at his bench, brass gears and tiny screws under a warm lamp, macro photograph, shallow depth of field"
CABIN = "A cosy brick house with a red roof in a snowy forest at dusk, light in the window, the moon behind it, watercolour"
HEARTS = "a scarlet heart, a green ring and a golden oak at night"
SIGN = 'a sign saying "old cat" in pink letters'
CAFE = "A yellow bicycle leans against a turquoise door, to its left two terracotta pots with lavender, Mediterranean noon light"


def file_table(*names: str) -> str:
    """Which file goes where, as a list with links."""
    lines = [f"- [{name}]({FILES[name].url}) into models/{FILES[name].folder} ({FILES[name].remark})" for name in names]
    return "### Files\n" + "\n".join(lines)


ENCODERS = ("distilled_t5_base.safetensors", "clip_l.safetensors")
DEV_FILES = (*ENCODERS, "flux1-dev.safetensors", "ae.safetensors")

DEV = f"""
## Flux dev with a distilled T5

**Distilled T5 Loader** stands where DualCLIPLoader used to stand. All other nodes are stock nodes: what it gives is an ordinary CLIP.

{file_table(*DEV_FILES)}

### What to expect
Most of the content of T5-XXL's pictures from a text encoder of 0.26 GB instead of 9.5 GB; a new prompt is encoded in about a second even
on a CPU (measured: 0.9 s on one thread). Words to be written in the picture are what a small encoder does worst.

Flux.1-dev's licence is non-commercial.
"""

SCHNELL = f"""
## Flux schnell with a distilled T5

Four steps, no guidance: schnell takes none, so there is no FluxGuidance node. The encoder was distilled with Flux dev and works with
schnell unchanged.

{file_table(*ENCODERS, "flux1-schnell.safetensors", "ae.safetensors")}

### What to expect
A fifth of the time of Flux dev with 20 steps, and a little less detail. Flux.1-schnell is under Apache-2.0.
"""

LORA = f"""
## Flux dev, a LoRA and a distilled T5

A LoRA changes Flux and CLIP-L as always. Layers that it brings for T5-XXL do not fit a smaller T5 and are left out; the log says so in
one line.

{file_table(*DEV_FILES, "FLUX-dev-lora-add_details.safetensors")}

### What to expect
The LoRA's effect as with T5-XXL. Set *strength_model* to 0 to see the picture without it.
"""

CONTROLNET = f"""
## Flux dev, a ControlNet and a distilled T5

Edges are taken from a picture (choose your own in **Load Image**) and the new picture keeps them. The ControlNet reads the same text
embedding as Flux does, so it needs no change either.

{file_table(*DEV_FILES, "flux-canny-controlnet-v3.safetensors")}

### What to expect
The shapes of your picture in the style of the prompt. Lower *strength* or *end_percent* if the edges hold too fast.
"""

VERSUS = f"""
## T5-XXL and the distilled T5, side by side

One prompt, one seed, one size; the only difference is the text encoder. Left: the distilled T5. Right: T5-XXL.

{file_table(*DEV_FILES, "t5xxl_fp16.safetensors")}

### What to expect
Two different pictures of the same content. Look at objects, colours and places; then try a prompt with written words, where the small
encoder falls behind first. T5-XXL needs 9.5 GB of memory and takes its time to load; watch the progress of both.
"""

SAVE = f"""
## Look into an encoder, and save a copy

Needs no diffusion model.

{file_table(*ENCODERS)}

### What to expect
**What was loaded** names size, number format, memory and trained token length. **Does my prompt fit?** counts its tokens.
**Distilled T5 Save** writes models/text_encoders/my_distilled_t5.safetensors, here in fp8: half the size, a little precision lost.
Choose *as loaded* for an exact copy. Press R afterwards and the new file is in the loader's list.
"""

APP = f"""
## Flux dev with a distilled T5, as an app

Opened in app mode, this workflow shows a prompt, five numbers and the picture. Leave app mode to see the graph.

{file_table(*DEV_FILES)}

Flux.1-dev's licence is non-commercial.
"""

MINIATURE = """
## The miniature: Flux on a laptop

A whole Flux world that comes with this pack and needs no download: a T5 teacher, a Flux, a VAE and students of the teacher, so small that
a picture takes a second or two on a CPU. All nodes are those of the real thing.

### What to ask for
Things: square, ring, cross, heart, tree. Colours: red, green, blue, yellow, orange, purple, pink, cyan. Places: in
the middle, on the left, at the top right, ... Relations: left of, above, ... One to four of a kind. Words of three letters on a sign.
Backgrounds: in the snow, at night, in the fog, on the beach, under water, on a meadow.

Pick another student, or the teacher, in **Distilled T5 Loader**. miniature/README.md says how all of it was made.
"""

MINIATURE_COMPARE = """
## The miniature: teacher and student side by side

One prompt, one seed, two text encoders: the teacher, which the little Flux was trained on, and a student with a quarter of its weights that
learned from it by step-following distillation, from prompts alone. It runs on a CPU and needs no download.

### What to try
The smaller students in the loader titled **Student**: what breaks first?
"""

CHECK_WRITTEN_TEXT = f"""
## Can the text in the picture be read?

**CommonText Prompt** gives a prompt with a text to be written, Flux draws it, **OCR Accuracy** reads the picture and says how much of the
text is there. Green boxes belong to the text, red ones do not. Set *seed* to *randomize* for another prompt each time.

{file_table(*DEV_FILES)}

### Two packages
`pip install wordfreq==3.1.1 easyocr` with ComfyUI's own Python. EasyOCR's weights are not downloaded by the node: its error says which
file goes where. With the reader *tesseract*, the system's Tesseract is used instead.

### What to expect
Of T5-XXL's texts the paper's readers found 59 % of the words, of a distilled T5-Base's 42 %. Compare both with the same seeds.

Flux.1-dev's licence is non-commercial.
"""

ATTENTION_MAP = """
## Where does Flux look at a word?

**Cross-Attention Map** stands in front of the sampler and makes the model record; **Attention Map Image** behind it shows how much each
part of the picture attends to the *word*. The picture itself stays the same to the bit.

It runs on the miniature, a little Flux that comes with this pack, on any CPU. With Flux dev it is the same: load your own models, and set
the picture's size and the prompt.

### What to try
Another word of the prompt: *ring*, *golden*, *night*. *step* 1 to 20 instead of 0, the mean of all. Another step needs no new sampling.
"""

ENCODER_REPORT = """
## What do text encoders cost here?

**Encoder Report** measures each encoder on this machine: parameters, bytes, and the time to load, to encode and to change the prompt.
Connect your own loaders, up to four: a distilled T5 next to T5-XXL from DualCLIPLoader, for example.

The two here are the miniature's, teacher and student; they come with this pack.
"""

ENCODER_MAP = """
## Do two encoders see prompts alike?

**Text Encoder Map** draws each prompt as a point, near those that the encoder takes for alike. A student that learned well lies on its
teacher; one that collapsed lies in a heap. *In words* has the numbers.

It needs `pip install scikit-learn matplotlib` with ComfyUI's own Python. The two encoders here are the miniature's; they come with this
pack.
"""
