"""Choose which parameters are trained."""

from __future__ import annotations

from torch import nn

from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters.base import ClipAdapter, Tower
from cliperase_fast.models.lora import inject_lora


def set_trainable(
    adapter: ClipAdapter, spec: str, lora_rank: int = 8, lora_alpha: float = 16.0
) -> list[tuple[str, nn.Parameter]]:
    """Set `requires_grad` on the parameters that `spec` names, clear it on all others, and return the former in order.

    all: both towers and `logit_scale`. image, text: that tower with its projection. last:K: the last K blocks of each
    tower and what follows them (final norm, pooling, projection). lora: LoRA updates of the linear layers in both
    towers' blocks, injected in place (see `merge_lora`). `logit_scale` is trained only with "all"; parameters that
    neither encoder uses are never trained. Raises `InputError` for an unknown spec, a K larger than a tower, towers or
    blocks that cannot be identified, and "lora" without peft.
    """
    module = adapter.module
    if spec == "lora":
        inject_lora(adapter, lora_rank, lora_alpha)
        return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    chosen = _chosen(adapter, spec)
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in chosen)
    return [(name, parameter) for name, parameter in module.named_parameters() if name in chosen]


def _chosen(adapter: ClipAdapter, spec: str) -> set[str]:
    names = [name for name, parameter in adapter.module.named_parameters() if parameter.is_floating_point()]
    towers = {name: adapter.tower(name) for name in names}
    if spec == "all":
        # The names of a generic module's parameters need not tell the tower.
        return set(names) if adapter.kind == "generic" else {name for name in names if towers[name]}
    kind, _, count = spec.partition(":")
    if kind not in ("image", "text") and not (kind == "last" and count.isdecimal() and int(count) > 0):
        raise InputError(f"trainable={spec!r}: use all, image, text, last:K (K at least 1) or lora")
    for tower in ("image", "text"):
        if tower not in towers.values():
            children = ", ".join(name for name, _ in adapter.module.named_children()) or "none"
            raise InputError(
                f"trainable={spec!r}: no parameter of this {type(adapter.module).__name__} seems to belong to the "
                f"{tower} tower "
                f'(its parts: {children}); name the parts image_... and text_..., or use trainable="all"'
            )
    if kind in ("image", "text"):
        return {name for name in names if towers[name] == kind}
    return _last(adapter, spec, int(count), towers)


def _last(adapter: ClipAdapter, spec: str, count: int, towers: dict[str, Tower | None]) -> set[str]:
    image, text = adapter.blocks()
    most = min(len(image), len(text))
    if count > most:
        remedy = f"use at most {most}" if most else 'use trainable="all", "image" or "text"'
        raise InputError(
            f"trainable={spec!r}: the image tower has {len(image)} known blocks and the text tower {len(text)}; "
            f"{remedy}"
        )
    kept = {id(parameter) for block in (*image[-count:], *text[-count:]) for parameter in block.parameters()}
    frozen = {id(parameter) for block in (*image[:-count], *text[:-count]) for parameter in block.parameters()}
    return {
        name
        for name, parameter in adapter.module.named_parameters()
        if name in towers
        and (id(parameter) in kept or (id(parameter) not in frozen and towers[name] and adapter.is_tail(name)))
    }
