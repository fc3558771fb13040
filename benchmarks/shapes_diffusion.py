"""A small text-to-image model of the rendered shapes, trained here, and a classifier that judges its pictures.

The model is a diffusion model of pixels that reads the hidden states of a CLIP's text tower, as Stable Diffusion does:
a `UNet2DConditionModel` of diffusers over blocks of 4 x 4 pixels, sampled with DDIM and classifier-free guidance. The
CLIP is the one of `cliperase-fast demo --data shapes`, and its text tower stays frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from transformers import CLIPTokenizer

from cliperase_fast import export
from cliperase_fast.data.drawing import seeded
from cliperase_fast.data.shapes import CLASSES, render_split
from cliperase_fast.defaults import torch_defaults
from cliperase_fast.demo import cached_folder, cached_small_clip
from cliperase_fast.demo_models import demo_model_for
from cliperase_fast.models import load_model
from cliperase_fast.progress import Steps

SIZE, BLOCK = 32, 4  # pixels of a picture's side, and of a side of the blocks that are its latent channels
_CAPTIONS = ("a {}", "a photo of a {}", "a picture of a {}")  # of the training pictures


@dataclass(frozen=True)
class Training:
    """How the denoiser is trained. average: of the weights that are kept. unconditional: the share without caption."""

    widths: tuple[int, int] = (64, 96)
    per_class: int = 100
    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: int = 100
    average: float = 0.995
    unconditional: float = 0.1
    most_weight: float = 5.0  # of a time step: its signal-to-noise ratio, at most this
    seed: int = 0


class ShapesPipeline(DiffusionPipeline):
    """Paint shapes from captions. Called like the pipelines of diffusers."""

    model_cpu_offload_seq = "text_encoder->unet"

    def __init__(self, text_encoder: Any, tokenizer: Any, unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)

    def encode(self, prompts: Sequence[str]) -> Tensor:  # -> [B, L, W]
        """Return the hidden states of all tokens."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str],
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        hidden = self.encode(prompt)
        empty = self.encode([""]).expand_as(hidden)
        both = torch.cat([empty, hidden])
        side = SIZE // BLOCK
        shape = (len(prompt), 3 * BLOCK * BLOCK, side, side)
        sample = randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for time in self.progress_bar(self.scheduler.timesteps):
            without, given = self.unet(torch.cat([sample, sample]), time, both).sample.chunk(2)
            clean = without + guidance_scale * (given - without)
            sample = self.scheduler.step(clean, time, sample).prev_sample
        pixels = F.pixel_shuffle(sample, BLOCK).clamp(-1, 1) / 2 + 0.5  # [B, 3, H, W]
        if output_type == "pt":
            return ImagePipelineOutput(images=pixels)
        images = pixels.float().cpu().permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(images) if output_type == "pil" else images)


def small_clip() -> Path:
    """Return the folder of the demo's CLIP of the shapes."""
    return cached_small_clip("shapes", demo_model_for("shapes"))


def new_pipeline(clip: Path, widths: tuple[int, int]) -> ShapesPipeline:
    """Return an untrained pipeline with the text tower and the vocabulary of a CLIP."""
    adapter = load_model(f"local-dir:{clip}")
    assert adapter.tokenizer is not None
    words = adapter.tokenizer.source
    start, end = (words.decoder[token] for token in (words.sot_token_id, words.eot_token_id))
    tokenizer = CLIPTokenizer(
        vocab=dict(words.encoder),
        merges=list(words.bpe_ranks),
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=words.decoder[0],
        model_max_length=adapter.context_length,
    )
    encoder = export.to_diffusers_text_encoder(adapter.module)
    channels = 3 * BLOCK * BLOCK
    unet = UNet2DConditionModel(
        sample_size=SIZE // BLOCK,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=encoder.config.hidden_size,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="trailing", clip_sample=True
    )
    return ShapesPipeline(encoder, tokenizer, unet, scheduler)


def pixels_of(per_class: int, seed: int, part: int = 0) -> tuple[Tensor, Tensor]:
    """Return rendered pictures uint8 [100 n, 3, H, W] and their classes int64."""
    pixels, labels = render_split(per_class, SIZE, seed, part)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels)


def train(pipeline: ShapesPipeline, how: Training, *, progress: bool = False, each: Any = None) -> None:
    """Train the pipeline's denoiser. each: called after every step with the number of steps and the averaged weights.

    The network predicts the clean picture (Ho and Salimans, arXiv 2202.00512, section 4 compares the targets), and a
    time step weighs as much as its signal-to-noise ratio, bounded (Hang et al., arXiv 2303.09556).
    """
    unet, noising = pipeline.unet, pipeline.scheduler.alphas_cumprod
    pixels, labels = pixels_of(how.per_class, how.seed)
    clean = F.pixel_unshuffle(pixels.float() / 127.5 - 1, BLOCK)  # [n, C, h, w]
    with torch.no_grad():
        captions = [pipeline.encode([caption.format(name) for name in CLASSES]) for caption in _CAPTIONS]
        hidden = torch.stack([*captions, pipeline.encode([""]).expand_as(captions[0])])  # [captions + 1, classes, L, W]
    average = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=how.learning_rate, betas=(0.9, 0.99), fused=True)
    unet.train()
    with Steps(how.steps, "training a diffusion model", "step", bar=progress, leave=True) as steps:
        for step in range(1, how.steps + 1):
            optimizer.param_groups[0]["lr"] = how.learning_rate * min(1.0, step / how.warmup)
            chosen = torch.randint(len(clean), (how.batch_size,))
            caption = torch.randint(len(_CAPTIONS), (how.batch_size,))
            caption[torch.rand(how.batch_size) < how.unconditional] = len(_CAPTIONS)
            time = torch.randint(len(noising), (how.batch_size,))
            kept = noising[time][:, None, None, None]
            noisy = kept.sqrt() * clean[chosen] + (1 - kept).sqrt() * torch.randn_like(clean[chosen])
            found = unet(noisy, time, hidden[caption, labels[chosen]]).sample
            error = (found - clean[chosen]).square().mean((1, 2, 3))  # [B]
            ratio = (noising / (1 - noising))[time]
            loss = (error * (ratio.clamp_max(how.most_weight) + 0.5)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                decay = min(how.average, step / (step + 10))
                for name, value in unet.state_dict().items():
                    average[name].lerp_(value, 1 - decay)
            steps.update(note=f"loss {loss.item():.4f}")
            if each is not None:
                each(step, average)
    unet.load_state_dict(average)
    unet.eval()


@torch_defaults()
def cached_pipeline(*, progress: bool = False) -> ShapesPipeline:
    """Return the trained pipeline, which the first call trains (`cached_folder`)."""
    how, clip = Training(), small_clip()

    def make() -> _Saved:
        with seeded(how.seed):
            pipeline = new_pipeline(clip, how.widths)
            train(pipeline, how, progress=progress)
        return _Saved(pipeline)

    return ShapesPipeline.from_pretrained(cached_folder("shapes-diffusion", made_from(how, clip), make))


def made_from(how: Training, clip: Path) -> dict[str, Any]:
    return {**asdict(how), "clip": clip.name, "size": SIZE, "block": BLOCK, "captions": list(_CAPTIONS)}


class _Saved:
    """Give a pipeline or a module the `save` of an adapter."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline

    def save(self, directory: Path) -> None:
        self.pipeline.save_pretrained(directory)
