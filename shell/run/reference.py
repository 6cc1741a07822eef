"""The reference: a checkpoint's model as transformers runs it, on one process.

It shares no code with our networks. It has eager attention, no dropout and no cache.

transformers casts to single precision inside, whatever the precision of the model: in norms, rotary tables,
softmaxes, routers and the loss. In double precision its gradients are therefore off by about 1e-6. The
reference *lifts* these casts: while it is loaded and while it runs, every call of torch that asks for single
precision gets double (`double_precision`). No module is patched, so there is nothing to restore. Every lift is
listed with the function that asked for it.
"""

import importlib
import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.shell.runtime.tensor_slices import Tensors


@attrs.frozen
class Reference:
    """A model of transformers.

    Attributes:
        model: the model, in evaluation mode.
        names: the names of the tensors in its folder.
        casts: how often each cast was lifted so far.
    """

    model: Any
    names: frozenset[str]
    casts: Counter[str]

    @property
    def lifted(self) -> tuple[str, ...]:
        """The lifted casts, each as the function of transformers and the operation that it called."""
        return tuple(sorted(self.casts))


@attrs.frozen
class ReferenceStep:
    """Loss, logits and gradients of one batch.

    Attributes:
        loss: transformers' loss: a mean over the tokens with a label; each is predicted from those before it. Or that
            of the caller (`step_of`).
        logits: scores of the next token, [samples, tokens, vocabulary].
        gradients: full gradients by the names of the tensors in the folder. A tensor that the loss does not
            depend on has none, and neither has one that transformers freezes.
    """

    loss: float
    logits: torch.Tensor
    gradients: Tensors


def reference(
    folder: Path, dtype: torch.dtype = torch.float64, *, device: torch.device | None = None
) -> Reference:
    """Return the model of a checkpoint folder in a precision; in double precision casts are lifted.

    Raises:
        PlanError: transformers is not installed, does not have the architecture, or lacks weights of it.
    """
    transformers = _transformers()
    names, casts, architecture = _names(folder), Counter[str](), _architecture(transformers, folder)
    with _quiet(transformers), _precision(dtype, casts):
        model, info = architecture.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        fact = f"lacks {len(missing)} of the model's tensors, such as {missing[0]}"
        raise PlanError([Problem(str(folder), fact, "Download the checkpoint again, with all of its files.")])
    _freeze(model)
    return Reference(model.eval().to(device), names, casts)


def _freeze(model: Any) -> None:
    """Freeze the parameters that the model's class freezes; `from_pretrained` makes all of them trainable."""
    with torch.device("meta"):
        built = type(model)(model.config)
    trained = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def losses_and_gradients(
    reference: Reference, batch: Mapping[str, torch.Tensor], *, num_items_in_batch: int | None = None
) -> ReferenceStep:
    """Return loss, logits and gradients of a batch: what the model's processor makes, and `labels`.

    With `num_items_in_batch` the loss is the sum over the tokens with a label, divided by this number.
    """
    has_own_mean = reference.model.config.model_type in _OWN_MEANS
    inputs = dict(batch)
    if num_items_in_batch is not None and not has_own_mean:
        inputs["num_items_in_batch"] = torch.tensor(num_items_in_batch)

    def loss_of(output: Any) -> torch.Tensor:
        loss: torch.Tensor = output.loss
        if num_items_in_batch is not None and has_own_mean:
            loss = loss * int((inputs["labels"][:, 1:] != IGNORED).sum()) / num_items_in_batch
        return loss

    return step_of(reference, inputs, loss_of)


def step_of(
    reference: Reference, batch: Mapping[str, torch.Tensor], loss_of: Callable[[Any], torch.Tensor]
) -> ReferenceStep:
    """Return logits of a batch, with a loss of what the model returns, and the gradients of that loss."""
    model = reference.model
    inputs = {name: tensor.to(model.device) for name, tensor in _with_kinds(model, batch).items()}
    model.zero_grad()
    with _precision(model.dtype, reference.casts):
        output = model(**inputs, use_cache=False)
        loss = loss_of(output)
        loss.backward()
    return ReferenceStep(loss.item(), output.logits.detach(), _gradients(reference))


IGNORED = -100
"""The label of a token that does not count in the loss."""

# These models compute their own loss and ignore `num_items_in_batch`.
_OWN_MEANS = frozenset({"qwen2_audio"})


# -- precision


@contextmanager
def double_precision(casts: Counter[str]) -> Iterator[None]:
    """Give double precision to all calls of torch that ask for single precision; count them in `casts`.

    The default precision is double too. Both end with the context.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Lift(casts):
            yield
    finally:
        torch.set_default_dtype(default)


class _Lift(TorchFunctionMode):
    """Replaces single precision by double in the arguments of every function of torch."""

    def __init__(self, casts: Counter[str]) -> None:
        super().__init__()
        self._casts = casts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        asks = func is torch.Tensor.float or any(_is_single(value) for value in (*args, *kwargs.values()))
        if not asks:
            return func(*args, **kwargs)
        self._casts[f"{_caller()}: {func.__name__}"] += 1
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_doubled, args), **{name: _doubled(value) for name, value in kwargs.items()})


def _is_single(value: object) -> bool:
    return value is torch.float32


def _doubled(value: Any) -> Any:
    return torch.float64 if _is_single(value) else value


def _caller() -> str:
    """Return ``module.function`` of the innermost function of transformers on the stack."""
    frame = sys._getframe(1)
    while frame.f_back and not str(frame.f_globals.get("__name__")).startswith("transformers."):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}".removeprefix("transformers.")


@contextmanager
def _precision(dtype: torch.dtype, casts: Counter[str]) -> Iterator[None]:
    if dtype != torch.float64:
        yield
        return
    with double_precision(casts):
        yield


# -- transformers


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        fact = "transformers is not installed"
        raise PlanError([Problem("reference", fact, "Run: pip install 'mimogrid[hf]'.")]) from error


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Show no progress bars."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _architecture(transformers: ModuleType, folder: Path) -> Any:
    """Return the class of the folder's model."""
    config = json.loads(_file(folder, "config.json").read_text())
    (name, *_) = config.get("architectures") or ["none"]
    found = getattr(transformers, name, None)
    if found is None:
        fact = f"transformers {transformers.__version__} has no architecture {name!r}"
        raise PlanError([Problem(str(folder / "config.json"), fact, "Install a version that has it.")])
    return found


def _names(folder: Path) -> frozenset[str]:
    """Return the names of the tensors in a folder."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return frozenset(json.loads(index.read_text())["weight_map"])
    with safe_open(_file(folder, "model.safetensors"), "pt") as file:
        return frozenset(file.keys())


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise PlanError(
            [Problem(str(folder), f"has no {name}", "Name the folder of a checkpoint in safetensors.")]
        )
    return folder / name


def _with_kinds(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch with the kinds of its tokens (0 text, 1 image, 2 video) if the model reads them.

    Processors of older versions do not make them. Without them Qwen2.5-VL silently gives the rows of an image
    the positions of text.
    """
    name, config = "mm_token_type_ids", model.config
    if name in batch or name not in inspect.signature(model.forward).parameters:
        return dict(batch)
    tokens = batch["input_ids"]
    kinds = (tokens == config.image_token_id).int() + 2 * (tokens == config.video_token_id).int()
    return {**batch, name: kinds}


def _gradients(reference: Reference) -> Tensors:
    """Return the gradients by the names on disk, where the parts of a fused parameter are separate tensors."""
    loading = importlib.import_module("transformers.core_model_loading")
    found = {name: p.grad for name, p in reference.model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        named = loading.revert_weight_conversion(reference.model, found)
    assert named.keys() <= reference.names, f"not in the folder: {sorted(named.keys() - reference.names)}"
    return dict(named)
