"""`reblock pipeline`: assembles a diffusers Mochi pipeline folder from parts that were trained separately."""

import json
import math
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from data.files import atomic_folder
from data.synth.layered import LAYERED_CAPTION_WORDS
from data.synth.scenes import CAPTION_WORDS
from trainer import run_files
from trainer.graft import apply_graft, load_graft
from trainer.models.from_scratch import draw_frequencies

#: Number of caption tokens after padding, as in Mochi.
MAX_TEXT_TOKENS = 256
#: Kind of captions -> words that they use.
_WORDS = {"scenes": CAPTION_WORDS, "layered": LAYERED_CAPTION_WORDS}


def caption_tokenizer(vocabulary: tuple[str, ...]) -> T5Tokenizer:
    """A T5 tokenizer with one token per word of `vocabulary`; it splits other lower-case words into letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789,.-'")
    log_probability = -math.log(len(vocabulary))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -10.0)]
    pieces += [(f"▁{word}", log_probability) for word in sorted(set(vocabulary))]
    pieces += [(letter, -12.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TEXT_TOKENS)


def small_text_encoder(vocabulary: int, width: int, seed: int) -> T5EncoderModel:
    """A T5 encoder with random weights. It preserves identity and order of words, which is enough for tiny captions."""
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5EncoderModel(config).eval()


def _transformer(config: Path, run: Path, seed: int) -> MochiTransformer3DModel:
    """Builds the transformer of a run that trained all blocks of `config`: EMA weights and fixed rotary frequencies."""
    model = MochiTransformer3DModel.from_config(json.loads(config.read_text()))
    graft = load_graft(run / run_files.GRAFT)
    draw_frequencies(model, seed)
    apply_graft(model, graft.ema)
    return model


def pipeline(
    out: Path,
    *,
    vae: Path,
    transformer_config: Path = Path("recipes/demo_base_config.json"),
    run: Path | None = None,
    captions: Literal["scenes", "layered"] = "scenes",
    seed: int = 0,
    half: bool = True,
) -> None:
    """Writes a diffusers Mochi pipeline folder: VAE, T5 encoder and tokenizer, scheduler, transformer.

    The tokenizer is built from the captions' words. The text encoder has random weights.

    Args:
        out: folder to write; it must not exist.
        vae: folder of a trained AutoencoderKLMochi, as recipes/demo_vae.yaml writes it.
        transformer_config: diffusers config of the transformer.
        run: run folder of the transformer's training with this config (recipes/demo_base.yaml). Without it the weights
            are random, which is enough for `reblock encode`.
        captions: captions whose words become tokens: `scenes` (`reblock synth`) or `layered` (`reblock synth-latents`).
        seed: seed of the text encoder, and of the transformer's rotary frequencies (the run's surgery.seed).
        half: whether to store weights in 16 bits.

    Raises:
        ValueError: if `out` exists, or a part is missing.
    """
    if out.exists():
        raise ValueError(f"{out} exists; expected a new folder, since nothing is overwritten.")
    for path in (vae / "config.json", transformer_config):
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected a diffusers config there.")
    if run is None:
        model = MochiTransformer3DModel.from_config(json.loads(transformer_config.read_text()))
    else:
        model = _transformer(transformer_config, run, seed)
    encoder = AutoencoderKLMochi.from_pretrained(vae, torch_dtype=torch.float32)
    encoder.register_to_config(_name_or_path="")  # the folder may be published, so no local path in it
    tokenizer = caption_tokenizer(_WORDS[captions])
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=encoder,
        text_encoder=small_text_encoder(len(tokenizer), model.config.text_embed_dim, seed),
        tokenizer=tokenizer,
        transformer=model,
        force_zeros_for_empty_prompt=True,
    )
    if half:
        pipe.to(torch.float16)
    with atomic_folder(out) as temporary:
        pipe.save_pretrained(temporary, safe_serialization=True)
    print(
        f"{out}: a Mochi pipeline folder, {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB"
    )
