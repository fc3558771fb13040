"""`unlearn()`: from a model and two sets of pairs to an unlearned model with its evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.allocation import reuse_freed_memory
from cliperase_fast.coercion import is_auto
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data.drawing import seeded
from cliperase_fast.defaults import plain_torch
from cliperase_fast.distributed import init_distributed
from cliperase_fast.errors import UnlearningError
from cliperase_fast.models.runtime import set_training_modes
from cliperase_fast.progress import bars_by_default
from cliperase_fast.storage import output_folder
from cliperase_fast.unlearning.auditing import add_audit
from cliperase_fast.unlearning.engines.deepspeed import restore_torch_linear
from cliperase_fast.unlearning.methods import Method, make_method
from cliperase_fast.unlearning.output_model import OutputModel, finalize_model
from cliperase_fast.unlearning.preparation import load, prepare
from cliperase_fast.unlearning.record import record
from cliperase_fast.unlearning.result import UnlearnResult
from cliperase_fast.unlearning.run import Inputs, Run
from cliperase_fast.unlearning.run_directory import RunDirectory
from cliperase_fast.unlearning.runtime import Runtime


@reuse_freed_memory()
@plain_torch()
@torch.enable_grad()
def unlearn(
    model: Any,
    forget: Any,
    retain: Any,
    *,
    method: str | None = None,
    test: Any = None,
    validation: Any = None,
    oracle: Any = None,
    teacher: Any = None,
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    config: UnlearnConfig | Mapping[str, Any] | str | Path | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    templates: Sequence[str] | None = None,
    progress: bool | None = None,
    **overrides: Any,
) -> UnlearnResult:
    """Make `model` forget the associations in `forget` while it keeps those in `retain`.

    model: a model of open_clip or transformers (docs/models.md), a module with encode_image, encode_text and
        logit_scale, or a string ("ViT-B-32:openai", "ARCH:/path/to/checkpoint", "local-dir:DIR", a transformers
        folder). It is left untouched. Training is in float32 whatever the weights are; those of an instance in another
        type are rounded to that type once at the end, unless that would undo the forgetting (result.record["weights"]
        says which).
    forget, retain: map-style datasets of (image, caption) pairs, or source strings: forget "SOURCE#SELECTOR" such as
        "cifar10:/data#class:airplane", retain "rest", "SOURCE" or "SOURCE#SELECTOR". An image is a PIL image or a
        tensor [3, H, W] that is passed on as it is; a caption is a string, a list of strings, or token ids [L].
    method: one of `cliperase_fast.methods()`, by default config's, which is calibrated forgetting; it wins over
        config. Its options are given as `method_options={...}`.
    test: where the result is measured: a dataset or source of both kinds, or (forget_test, retain_test). By default the
        source's own test split, else a share `test_fraction` of the pairs, which are then not trained on.
    validation: where the learning rate and the checkpoint are chosen, as `test`: a set of your own is best if the model
        was trained on these pairs. By default a share `val_fraction` of the pairs, which are then not trained on.
    oracle: for `audit=True`: a model, or a list of models, trained like the original but without the forget pairs.
    teacher: the model to stay consistent with; by default `model` as it is now.
    tokenizer, transform: inferred for open_clip and transformers models.
    config, overrides: an UnlearnConfig, a mapping or a YAML/JSON file; keywords win over it.
    output_dir: the run directory (checkpoints, metrics, report, model); without it nothing is kept on disk.
    resume: go on from the last checkpoint in output_dir. On the CPU the weights come out as those of an uninterrupted
        run, bit for bit.
    templates: caption templates ("a photo of a {}") of class sources.
    audit (a setting): True also audits the result on its test split (`cliperase_fast.audit`), once it is saved; "depth"
        and "full" attack copies of the models too.
    progress: progress bars; by default when standard error is a terminal. Without them the logger "cliperase_fast" has
        a line for each phase and every few seconds (`logging.basicConfig(level=logging.INFO)` shows them).

    Under torchrun or the deepspeed launcher, or where torch.distributed is initialised, every process calls it with the
    same arguments: each has its share of every batch, all get the result, the first shows progress and writes files
    (docs/many-devices.md).

    Returns an `UnlearnResult`. Raises `InputError` before any training when something given is wrong, `UnlearningError`
    when the training fails.
    """
    method_used, settings = make_method(_settings(config, method, overrides))
    inputs = Inputs(model, forget, retain, test, validation, teacher, tokenizer, transform, templates, oracle)
    show = bars_by_default() if progress is None else progress
    directory = RunDirectory(None if output_dir is None else output_folder(output_dir, "output_dir="), resume)
    # What reading data and trying a transform draws must not come from the caller's generators.
    with (
        init_distributed(settings.device, settings.rank_timeout) as ranks,
        directory,
        seeded(settings.seed, gpus=False),
    ):
        runtime = ranks.run_on_all(lambda: Runtime.from_config(settings, show, ranks))
        return _unlearn(inputs, settings, method_used, directory, runtime)


def _unlearn(
    inputs: Inputs, settings: UnlearnConfig, method: Method, directory: RunDirectory, runtime: Runtime
) -> UnlearnResult:
    began = time.perf_counter()
    setup = load(inputs, settings, method, directory, runtime)
    with seeded(settings.seed), restore_torch_linear():  # the caller's random state and torch are put back
        run = prepare(setup, method, began)
        method.prepare(run)
        state = method.run(run)
        output = _finalize(run)
    result = record(run, method, state, output)
    if settings.audit:
        add_audit(run, result)
    return result


def _finalize(run: Run) -> OutputModel:
    """Measure the unlearned model, in the given one's modes, and in its dtypes unless that undid the forgetting."""
    set_training_modes(run.student.module, run.setup.models.modes)
    for parameter in run.student.module.parameters():  # what was frozen for this run is the caller's to train again
        parameter.requires_grad_(parameter.is_floating_point())
    run.say("measuring the unlearned model")
    rounded_to = run.setup.models.rounded_to
    output = finalize_model(run.student, rounded_to, run.baseline.encoded, run.evaluator, run.data.test)
    if not all(part.isfinite().all() for part in (output.encoded.image_features, output.encoded.caption_features)):
        rate = run.settings.learning_rate
        remedy = "try other settings of the method" if is_auto(rate) else f"give a lower learning_rate (now {rate:g})"
        raise UnlearningError(
            "the features of the unlearned model are not finite (NaN or infinity), so it cannot be used and is not "
            f"returned: {remedy}"
        )
    return output


def _settings(
    config: UnlearnConfig | Mapping[str, Any] | str | Path | None, method: str | None, overrides: Mapping[str, Any]
) -> UnlearnConfig:
    """Return the settings: config, over it the keywords. Options of a method that `method` replaces are dropped."""
    if config is None:
        config = UnlearnConfig()
    elif isinstance(config, (str, Path)):
        config = UnlearnConfig.from_file(config)
    elif not isinstance(config, UnlearnConfig):
        config = UnlearnConfig.from_dict(config)
    settings = config.to_dict()
    if method is not None and method != config.method:
        settings.update(method=method, method_options={})
    return UnlearnConfig.from_dict({**settings, **overrides})
