"""How the diffusers pipeline of each family is loaded, and how it is asked for videos of captions.

docs/models.md has the conventions of the families.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

from data.base_facts import read_base
from data.base_folder import read_class_config
from data.families import COGVIDEOX, HUNYUAN_VIDEO, MOCHI, WAN, VideoFamily
from trainer.models.load import check_base, read_facts


@dataclass(frozen=True)
class PipelineUse:
    """How the pipeline of a family is used.

    Args:
        family: its name, classes and sizes.
        arguments: (pipeline, captions, guidance) -> arguments of the pipeline's call for a batch of them.
        guidance: what the pipeline itself takes by default.
        steps: number of denoising steps by default.
        frames: number of frames by default.
        guided: how the pipeline asks for the prediction without the caption: in one call with the other (`batch`), in a
            call of its own (`calls`), or never, since guidance is an input of the model (`embedded`).
        wide_vae: whether the VAE computes in float32, whatever the dtype of the other weights.
    """

    family: VideoFamily
    arguments: Callable[[Any, list[str], float], Mapping[str, Any]]
    guidance: float
    steps: int
    frames: int
    guided: Literal["batch", "calls", "embedded"]
    wide_vae: bool = False


def _mochi(pipe: Any, captions: list[str], guidance: float) -> Mapping[str, Any]:
    text, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    mask[[not caption for caption in captions]] = 0
    # The pipeline keeps latents and timesteps in the dtype of the embeddings, which should always be float32.
    text = text.float() * mask[..., None]
    return {
        "prompt_embeds": text,
        "prompt_attention_mask": mask,
        # The empty caption, as in training with dropped captions: zero embedding, zero mask.
        "negative_prompt_embeds": torch.zeros_like(text),
        "negative_prompt_attention_mask": torch.zeros_like(mask),
        "guidance_scale": guidance,
    }


def _wan(pipe: Any, captions: list[str], guidance: float) -> Mapping[str, Any]:
    return {"prompt": captions, "negative_prompt": [""] * len(captions), "guidance_scale": guidance}


def _hunyuan_video(pipe: Any, captions: list[str], guidance: float) -> Mapping[str, Any]:
    if pipe.transformer.config.guidance_embeds:  # an input of the model; there is no second pass without the caption
        return {"prompt": captions, "guidance_scale": guidance}
    return {"prompt": captions, "negative_prompt": [""] * len(captions), "true_cfg_scale": guidance}


def _cogvideox(pipe: Any, captions: list[str], guidance: float) -> Mapping[str, Any]:
    tokens = pipe.transformer.config.max_text_seq_length
    text, empty = pipe.encode_prompt(captions, [""] * len(captions), guidance > 1, max_sequence_length=tokens)
    # The pipeline keeps latents in the dtype of the embeddings, which should always be float32.
    embeddings = {"prompt_embeds": text.float(), "negative_prompt_embeds": None if empty is None else empty.float()}
    return {**embeddings, "guidance_scale": guidance}


_USES = {
    use.family.pipeline: use
    for use in (
        PipelineUse(MOCHI, _mochi, guidance=4.5, steps=32, frames=19, guided="batch"),
        PipelineUse(
            WAN, _wan, guidance=5.0, steps=32, frames=17, guided="calls", wide_vae=True
        ),  # as its authors decode
        PipelineUse(HUNYUAN_VIDEO, _hunyuan_video, guidance=6.0, steps=32, frames=17, guided="embedded"),
        # Both schedulers of CogVideoX take steps of 1000 // steps levels, which should add up to all of them.
        PipelineUse(COGVIDEOX, _cogvideox, guidance=6.0, steps=40, frames=17, guided="batch"),
    )
}


def family_use(family: VideoFamily) -> PipelineUse:
    """How the pipeline of a family is used."""
    return _USES[family.pipeline]


def pipeline_use(folder: Path) -> PipelineUse:
    """How the pipeline of a folder is used, by the class in its `model_index.json`.

    Raises:
        ValueError: if there is no such file, or it names a class of no known family.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no model_index.json; expected a complete diffusers pipeline folder "
            "(transformer, vae, text_encoder, tokenizer, scheduler), as `reblock export` writes it."
        )
    return _USES[read_class_config(path, *_USES)["_class_name"]]


def check_pipeline(folder: Path) -> PipelineUse:
    """Like `pipeline_use`, and checks that every part is there, without reading a weight.

    Raises:
        ValueError: also if a part is missing, incomplete, or of a version of the family that is not supported.
    """
    use = pipeline_use(folder)
    index = read_class_config(folder / "model_index.json", use.family.pipeline)
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, which its model_index.json names; expected a complete pipeline "
            f"folder of {use.family.title}. Copy or download what is missing."
        )
    read_base(folder)
    read_facts(check_base(str(folder)))
    return use


def load_pipeline(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads the pipeline of a folder. Latents are float32 between its steps, whatever the dtype of the weights.

    Args:
        folder: complete diffusers pipeline folder.
        dtype: dtype of the weights.
        device: where it runs.

    Raises:
        ValueError: as `pipeline_use`.
    """
    use = pipeline_use(folder)
    vae_dtype = torch.float32 if use.wide_vae else dtype
    pipe = getattr(diffusers, use.family.pipeline).from_pretrained(
        folder, torch_dtype={"default": dtype, "vae": vae_dtype}, local_files_only=True
    )
    pipe = pipe.to(device)
    if dtype != torch.float32:
        pipe.transformer.forward = _wide_forward(pipe, dtype, device)
    if vae_dtype != torch.float32:
        pipe.vae.decode = _wide_decode(pipe.vae, vae_dtype, device)
    return pipe


def _wide_forward(pipe: Any, dtype: torch.dtype, device: torch.device) -> Callable[..., tuple[Tensor]]:
    """The transformer's forward under autocast, from float32 to float32, as in training.

    Pipelines guide and step in the dtype of what the transformer gives, and diffusers' Euler scheduler even returns the
    latents in it.
    """
    forward = pipe.transformer.forward

    def wide_forward(**inputs: Any) -> tuple[Tensor]:
        inputs = {
            name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        if "guidance" in inputs:  # the pipeline of HunyuanVideo rounds it: 6000 in bfloat16 is 6016
            inputs["guidance"] = torch.full_like(inputs["guidance"], 1000.0 * pipe.guidance_scale)
        with torch.autocast(device.type, dtype):
            (prediction,) = forward(**inputs)
        return (prediction.float(),)

    return wide_forward


def _wide_decode(vae: Any, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """The VAE's decode under autocast, of latents of any dtype."""
    decode = vae.decode

    def wide_decode(latents: Tensor, **options: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return decode(latents.float(), **options)

    return wide_decode
