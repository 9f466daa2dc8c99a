"""A tiny pipeline of each family, with random weights, and tokenizers that need no download."""

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from data.synth.command import CAPTION_WORDS
from tests.support.tiny_families import make

#: Width of caption embeddings and of the pooled one, as of `tiny_families`; tokens of a caption of CogVideoX.
TEXT_WIDTH, POOLED_WIDTH, COGVIDEOX_TOKENS = 16, 8, 20


def _t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -10.0)]
    pieces += [(f"▁{word}", -2.0) for word in CAPTION_WORDS] + [(letter, -12.0) for letter in "abcdefgh,&;"]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _word_tokenizer(length):
    """Words and signs become tokens; unknown words are drawn from a hundred more, so that captions differ."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *CAPTION_WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, padding_side="right", **tokens)


def _t5(config_class, kind, tokenizer):
    config = config_class(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return kind(config)


def _wan():
    tokenizer = _t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=_t5(UMT5Config, UMT5EncoderModel, tokenizer),
        vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1), scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=make("wan", in_channels=16, out_channels=16),
    )  # fmt: skip


def _cogvideox():
    tokenizer = _t5_tokenizer()
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=0.7
    )
    transformer = make(
        "cogvideox-5b", in_channels=16, out_channels=16, max_text_seq_length=COGVIDEOX_TOKENS, sample_frames=9
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer, text_encoder=_t5(T5Config, T5EncoderModel, tokenizer), vae=vae, transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
        ),
    )  # fmt: skip


def _hunyuan_video():
    llama, clip = _word_tokenizer(1000), _word_tokenizer(77)
    text = LlamaModel(
        LlamaConfig(
            vocab_size=len(llama), hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    pooler = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip), hidden_size=POOLED_WIDTH, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=77, pad_token_id=0, bos_token_id=1, eos_token_id=0,
        )
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False
    )
    return HunyuanVideoPipeline(
        text_encoder=text, tokenizer=llama, text_encoder_2=pooler, tokenizer_2=clip, vae=vae,
        transformer=make("hunyuan", in_channels=16, out_channels=16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


_PIPELINES = {"wan": _wan, "cogvideox": _cogvideox, "hunyuan_video": _hunyuan_video}


def make_pipeline(family, seed=0):
    """diffusers' own pipeline of a family, tiny."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = _PIPELINES[family]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline
