"""Captions of HunyuanVideo: a hidden layer of Llama for the tokens, CLIP's pooled output for the whole."""

from pathlib import Path

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

from data.encode.captions.caption_encoder import CaptionEncoder
from data.encode.load_part import load_part


class HunyuanVideoCaptions(CaptionEncoder):
    """Captions of HunyuanVideo, by diffusers' pipeline: its template and its hidden layer, the valid tokens only.

    An empty caption keeps the tokens that end the template, since the transformer needs at least one.
    """

    text_encoder_class = LlamaModel

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, max_tokens: int) -> None:
        super().__init__(folder, device, dtype, max_tokens)
        clip = load_part(CLIPTextModel, folder / "text_encoder_2", dtype=dtype).to(device).eval()
        self.pipeline = HunyuanVideoPipeline(
            tokenizer=self.tokenizer, text_encoder=self.text_encoder, vae=None, scheduler=None, transformer=None,
            tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
            text_encoder_2=clip,
        )  # fmt: skip

    def text(self, caption: str) -> Tensor:
        prompt, cut = DEFAULT_PROMPT_TEMPLATE["template"].format(caption), DEFAULT_PROMPT_TEMPLATE["crop_start"]
        tokens = self.tokenizer(prompt, truncation=True, max_length=cut + self.max_tokens).input_ids
        if len(tokens) <= cut:
            raise ValueError(
                f"the tokenizer makes {len(tokens)} tokens of HunyuanVideo's template and a caption, expected more "
                f"than the {cut} of the template: it is another model's. Copy or download the base's tokenizer."
            )
        # What is passed for the pooled embedding is handed back: CLIP does not run here.
        embeddings, _, _ = self.pipeline.encode_prompt(
            caption, pooled_prompt_embeds=torch.empty(0), max_sequence_length=len(tokens) - cut, device=self.device
        )
        return embeddings[0]

    def pooled(self, caption: str) -> Tensor:
        _, pooled, _ = self.pipeline.encode_prompt(caption, prompt_embeds=torch.empty(0), device=self.device)
        return pooled[0]
