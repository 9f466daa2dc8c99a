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
from trainer.graft import apply_graft, load_graft
from trainer.models.from_scratch import draw_frequencies

#: Caption tokens that the pipeline pads to, as in the real Mochi.
MAX_TEXT_TOKENS = 256
#: Whose captions -> their words.
_WORDS = {"scenes": CAPTION_WORDS, "layered": LAYERED_CAPTION_WORDS}


def caption_tokenizer(vocabulary: tuple[str, ...]) -> T5Tokenizer:
    """A T5 tokenizer with one token for each word of `vocabulary`; it spells other lower-case words by letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789,.-'")
    log_probability = -math.log(len(vocabulary))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -10.0)]
    pieces += [(f"▁{word}", log_probability) for word in sorted(set(vocabulary))]
    pieces += [(letter, -12.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TEXT_TOKENS)


def small_text_encoder(vocabulary: int, width: int, seed: int) -> T5EncoderModel:
    """A T5 encoder with random weights: it keeps identity and order of words, which is all that tiny captions need."""
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5EncoderModel(config).eval()


def _transformer(config: Path, run: Path, seed: int) -> MochiTransformer3DModel:
    """The transformer of a run that trained every block from `config`: its EMA weights, and the fixed frequencies."""
    model = MochiTransformer3DModel.from_config(json.loads(config.read_text()))
    graft = load_graft(run / "graft.safetensors")
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

    Text encoder and tokenizer are made here, from the captions' words and random weights.

    Args:
        out: folder to write; absent.
        vae: folder of a trained AutoencoderKLMochi, as recipes/demo_vae.yaml leaves it.
        transformer_config: the transformer's diffusers config.
        run: run that trained the transformer from this config (recipes/demo_base.yaml); without it its weights are
            random, which is enough for `reblock encode`.
        captions: whose words the tokenizer knows whole: `scenes` (`reblock synth`) or `layered`
            (`reblock synth-latents`).
        seed: of the text encoder, and of the transformer's rotary frequencies (the run's surgery.seed).
        half: store weights in 16 bits.

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
    encoder.register_to_config(_name_or_path="")  # no path of this machine in what may be published
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
