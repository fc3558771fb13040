"""Small models of every kind, and the comparisons the tests share."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

CAPTIONS = ["a photo of a dog", "red", "two small, round cats!"]


def tiny_config(**changes: Any) -> dict[str, Any]:
    """An open_clip model_cfg; `vision_cfg` and `text_cfg` entries are merged into the small ones."""
    vision = {"image_size": 16, "patch_size": 4, "width": 48, "layers": 2, "head_width": 12}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    return {
        "embed_dim": 24,
        **changes,
        "vision_cfg": {**vision, **changes.get("vision_cfg", {})},
        "text_cfg": {**text, **changes.get("text_cfg", {})},
    }


def tiny_open_clip(seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny open_clip model with random weights, every norm and scale included, so that each one shows."""
    config = tiny_config(**changes)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    torch.manual_seed(seed)
    model = kind(**config).eval()
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-1] not in ("logit_scale", "logit_bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


RESNET = {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32, "patch_size": None}}
TIMM = {
    "vision_cfg": {
        "timm_model_name": "test_vit",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 160,
    },
    "custom_text": True,
}


TIMM_CONVOLUTION = {
    **TIMM,
    "vision_cfg": {**TIMM["vision_cfg"], "timm_model_name": "test_efficientnet", "image_size": 64},
}


def tiny_hugging_face(
    family: str = "bert", pooler: str = "mean_pooler", projection: str | None = None, **vision: Any
) -> nn.Module:
    """A tiny open_clip model with a text tower from transformers, a BERT or a RoBERTa of up to 20 positions."""
    import transformers
    from open_clip.hf_model import HFTextEncoder

    kind = {"roberta": transformers.RobertaConfig, "bert": transformers.BertConfig}[family]
    config = kind(
        vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=20, pad_token_id=0,
    )  # fmt: skip
    config._name_or_path = "nobody/no-such-model"
    model: Any = tiny_open_clip(**(vision or {"custom_text": True}))
    torch.manual_seed(1)
    model.text = HFTextEncoder("", output_dim=24, config=config, pooler_type=pooler, proj_type=projection)
    return randomised(model.eval())


def pixels_for(model: nn.Module, count: int = 3) -> Tensor:  # [count, 3, H, W]
    if hasattr(model, "visual"):
        size = model.visual.image_size
    elif hasattr(model, "config"):
        size = model.config.vision_config.image_size
    else:
        size = 8  # `TwoTowers`
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def picture(seed: int = 0, width: int = 23, height: int = 31) -> Image.Image:
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).relu()


class TwoTowers(nn.Module):
    """A hand-made model with the interface of the generic kind."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.image_tower = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, width))
        self.image_blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.image_pre_norm, self.image_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.text_embedding = nn.Embedding(50, width)
        self.text_blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.text_proj = nn.Linear(width, width)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels: Tensor) -> Tensor:
        x = self.image_pre_norm(self.image_tower(pixels))
        for block in self.image_blocks:
            x = block(x)
        return self.image_norm(x)

    def encode_text(self, tokens: Tensor) -> Tensor:
        x = self.text_embedding(tokens).mean(dim=1)
        for block in self.text_blocks:
            x = block(x)
        return self.text_proj(x)


WORDS = ["<pad>", "<unk>", "a", "photo", "of", "dog", "red", "cat", "<start>", "<end>"]


def word_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer with one token a word: <start> a dog <end> <pad>."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 8), ("<end>", 9)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        **options,
    )


def tiny_clip(seed: int = 0, **text: Any) -> CLIPModel:
    words = {
        "vocab_size": 10,
        "bos_token_id": 8,
        "eos_token_id": 9,
        "pad_token_id": 0,
        "max_position_embeddings": 16,
    }
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**shape, "image_size": 16, "patch_size": 4}
    torch.manual_seed(seed)
    config = CLIPConfig(text_config={**words, **shape, **text}, vision_config=vision, projection_dim=24)
    return randomised(CLIPModel(config).eval())


def tiny_pipeline(text_encoder: nn.Module, tokenizer: PreTrainedTokenizerFast | None) -> Any:
    """A pipeline of diffusers that paints [3, 16, 16], with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **blocks,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        **blocks,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


MODELS: dict[str, Any] = {
    "open_clip": tiny_open_clip,
    "custom_text": lambda: tiny_open_clip(custom_text=True),
    "resnet": lambda: tiny_open_clip(**RESNET),
    "timm": lambda: tiny_open_clip(**TIMM),
    "transformers": tiny_clip,
    "generic": TwoTowers,
}
