"""transformers' model of a directory, built without weights; each layer's weights are loaded and dropped with the layer.

Masks, rotary embeddings and their choice for each kind of layer come from transformers.  Its forward pass runs once over
each batch without the decoder layers, and the arguments for each layer are recorded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mobe_gguf.calibrate.runnable import Runnable
from mobe_gguf.calibrate.scaled import route_sparsely
from mobe_gguf.core.errors import MobeError, one_line
from mobe_gguf.models.tensors import all_finite


class Enough(Exception):
    """Ends a forward pass when its needed results are there."""


@contextlib.contextmanager
def silent(quiet: bool) -> Iterator[None]:
    """Hide transformers' messages on stderr, except errors; without ``quiet`` hide only its progress bars of each load."""
    from transformers.utils import logging

    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if quiet:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


def unloadable(model: Path, what: str, error: Exception) -> MobeError:
    """The error when transformers cannot load something from a directory."""
    if "trust_remote_code" in str(error):
        code = ", ".join(sorted(p.name for p in model.glob("*.py"))) or "not in this directory"
        why = (
            f"transformers knows it only by Python code of its own ({code}), and code out of a model directory is never run "
            "here. Use --imatrix (llama-imatrix) for such a model"
        )
        return MobeError(f"{model}: {what} cannot be loaded: {why}")
    return MobeError(f"{model}: transformers cannot load {what}: {one_line(error) or type(error).__name__}")


class _NoWeights(TorchFunctionMode):
    """While active, parameters are created without memory (device ``meta``); buffers, which are computed, are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> _NoWeights:
        self._register = nn.Module.register_parameter

        def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and param.device.type != "meta":
                param = nn.Parameter(param.to("meta"), param.requires_grad)
            self._register(module, name, param)

        nn.Module.register_parameter = register  # type: ignore[assignment,method-assign]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        nn.Module.register_parameter = self._register  # type: ignore[method-assign]
        super().__exit__(*raised)


@dataclass
class Call:
    """How transformers calls a decoder layer: all positional and named arguments except the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def same(self, other: Call) -> bool:
        return _same((self.args, self.kwargs), (other.args, other.kwargs))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a is b or a == b)


class Skeleton:
    """The causal language model of ``checkpoint`` without weights, on ``device``.

    ``layers[i]`` is decoder layer i.  :meth:`load` loads its weights except the routed experts', and :meth:`drop` frees them.
    MobeError if transformers does not know the model, or needs code from its directory, which is never run.
    """

    def __init__(self, checkpoint: Runnable, device: str = "cpu"):
        self.checkpoint, self.device = checkpoint, device
        path = checkpoint.path
        try:
            from transformers import AutoModelForCausalLM
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        except ImportError as e:
            raise MobeError(
                f"this needs transformers 5 ({e}); install it:\n  pip install 'transformers>=5'"
            ) from e
        try:
            config = checkpoint.hf_config()
            self.dtype = _dtype(config, checkpoint)
            if checkpoint.n_ff_exp * self.dtype.itemsize % 16:  # torch's grouped products refuse such rows
                config._experts_implementation = "eager"
            with _NoWeights():
                self.model = AutoModelForCausalLM.from_config(
                    config, dtype=self.dtype, trust_remote_code=False
                ).eval()
        except Exception as e:  # transformers raises all sorts of errors here
            raise unloadable(path, "the model", e) from e
        route_sparsely(self.model)
        self.config = self.model.config
        self.layers_name, self.layers = self._find_layers()
        for name, buffer in list(self.model.named_buffers()):
            if not name.startswith(self.layers_name):
                _set(self.model, name, buffer.to(device))
        transforms = get_model_conversion_mapping(self.model)
        self._transforms = transforms
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._sources = self._find_sources(
            lambda name, there: rename_source_key(
                name, renamings, converters, self.model.base_model_prefix, there
            )
        )

    def _find_layers(self) -> tuple[str, nn.ModuleList]:
        n = self.checkpoint.n_layer
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and re.search(r"(^|\.)layers$", name) and len(module) == n:
                return f"{name}.", module
        raise MobeError(
            f"{self.checkpoint.path}: transformers' {type(self.model).__name__} has no list of {n} decoder layers"
        )

    def _find_sources(self, rename: Callable[[str, Any], tuple[str, str | None]]) -> dict[str, list[str]]:
        """Module that is loaded as a whole (a layer; elsewhere each tensor's own) -> tensors of the checkpoint."""
        there = self.model.state_dict()
        experts = re.compile(r"\.experts\.(\d+\.|(gate_up|up|down)_proj$)")
        routed = self.checkpoint.expert_names()
        sources: dict[str, list[str]] = {}
        for name in self.checkpoint.names:
            if name in routed or experts.search(name) or name.endswith("_scale_inv"):
                continue
            renamed, _ = rename(name, there)
            if renamed not in there and not renamed.startswith(self.layers_name):
                continue  # of a part that a text model does not have
            found = re.match(re.escape(self.layers_name) + r"(\d+)\.", renamed)
            sources.setdefault(found[0] if found else renamed, []).append(name)
        return sources

    # weights

    def load(self, layer: int) -> None:
        """Load a decoder layer's weights, except those of routed experts, in the model's type."""
        self._load(f"{self.layers_name}{layer}.")
        for name, buffer in self.layers[layer].named_buffers():
            _set(self.layers[layer], name, buffer.to(self.device))
        for name, tensor in self.layers[layer].named_parameters():
            if tensor.device.type == "meta" and not re.search(r"(^|\.)experts\.\w+_proj$", name):
                raise MobeError(
                    f"{self.checkpoint.path}: tensor {self.layers_name}{layer}.{name} is missing. Download the model again."
                )

    def _load(self, what: str) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        tensors = {name: self._tensor(name) for name in self._sources.get(what, ())}
        settings = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self._transforms,  # type: ignore[arg-type]
            device_map={"": self.device},
        )
        try:
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, settings)
        except Exception as e:  # transformers raises all sorts of errors here
            raise unloadable(self.checkpoint.path, what.rstrip("."), e) from e
        for name, got, expected in sorted(info.mismatched_keys):
            raise MobeError(
                f"{self.checkpoint.path}: tensor {name} has shape {list(got)}, expected {list(expected)} (from config.json)"
            )

    def _tensor(self, name: str) -> torch.Tensor:
        if self.checkpoint.dtype(name) == torch.float8_e4m3fn:
            return self.checkpoint.matrix(name).to(self.dtype)
        tensor = self.checkpoint.get(name)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise MobeError(f"{self.checkpoint.path}: tensor {name} holds values that are NaN or Inf")
        return tensor

    def drop(self, layer: int) -> None:
        """Free the memory of a layer's weights."""
        empty(self.layers[layer])

    # around the layers

    def embed(
        self, batches: list[torch.Tensor], keep: Callable[[int, torch.Tensor], None]
    ) -> list[list[Call]]:
        """Compute the hidden states before the first layer and pass them to ``keep(batch number, [chunks, ctx, d])``.  Returns
        how each layer is called in each batch; batches with equal calls share a list."""
        table = self.model.get_input_embeddings()
        names = [n for n, m in self.model.named_modules() if m is table]
        for name in names:
            self._load(f"{name}.weight")
        if table.weight.device.type == "meta":
            raise MobeError(f"{self.checkpoint.path}: tensor {names[0]}.weight is missing")
        calls: list[list[Call]] = []
        for number, ids in enumerate(batches):
            seen: list[Call] = []

            def put_aside(i: int, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if i == 0:
                    keep(number, hidden)  # noqa: B023, called at once
                seen.append(Call(args, kwargs))  # noqa: B023
                if i == len(self.layers) - 1:
                    raise Enough
                return hidden

            with self._put_aside(put_aside), contextlib.suppress(Enough):
                self.model(ids.to(self.device), use_cache=False)
            if len(seen) != len(self.layers):
                raise MobeError(
                    f"{self.checkpoint.path}: transformers calls {len(seen)} of {len(self.layers)} layers"
                )
            same = next((c for c in calls[::-1] if all(map(Call.same, c, seen))), seen)
            calls.append(same)
        empty(table)
        return calls

    @contextlib.contextmanager
    def _put_aside(self, instead: Callable[..., torch.Tensor]) -> Iterator[None]:
        for i, layer in enumerate(self.layers):
            layer.forward = lambda *args, _i=i, **kwargs: instead(_i, *args, **kwargs)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def head_inputs(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
        """Inputs of the output matrix, ``[chunks, ctx, d]``, from the last layer's output ``hidden``; None if the model has no
        such matrix."""
        head = self.model.get_output_embeddings()
        if head is None:
            return None
        seen: list[torch.Tensor] = []
        if not self._has_norm:
            self._load_rest(without=self._tables)
            self._has_norm = True

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise Enough

        table = self.model.get_input_embeddings()
        embed = lambda _: hidden  # noqa: E731, any states will do: the layers are not run
        table.forward, hook = embed, head.register_forward_pre_hook(look)
        try:
            with self._put_aside(lambda i, h, *a, **k: hidden), contextlib.suppress(Enough):
                self.model(ids.to(self.device), use_cache=False)
        finally:
            del table.forward
            hook.remove()
        return seen[0]

    _has_norm = False

    def _load_rest(self, without: Collection[str] = ()) -> None:
        """Load what is no layer's."""
        for what in self._sources:
            if not what.startswith(self.layers_name) and what not in without:
                self._load(what)

    @contextlib.contextmanager
    def whole_output(self) -> Iterator[None]:
        """Inside, all that follows the layers is loaded, for :meth:`logits`."""
        self._load_rest()
        self.model.tie_weights()
        head, table = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is None or head.weight.device.type == "meta":
            raise MobeError(f"{self.checkpoint.path}: the model has no output matrix, so no loss")
        self._has_norm = True
        self.model.requires_grad_(False)
        try:
            yield
        finally:
            for part in (head, table):
                empty(part)

    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``[chunks, ctx, n_vocab]`` of the last layer's output ``hidden``, in :meth:`whole_output`."""
        table = self.model.get_input_embeddings()
        table.forward = lambda _: hidden.detach()
        try:
            with self._put_aside(lambda i, h, *a, **k: hidden):
                found: torch.Tensor = self.model(ids.to(self.device), use_cache=False).logits
        finally:
            del table.forward
        return found

    @property
    def _tables(self) -> list[str]:
        both = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return [f"{name}.weight" for name, module in self.model.named_modules() if module in both]


def _dtype(config: Any, checkpoint: Runnable) -> torch.dtype:
    """The type of ``from_pretrained(dtype="auto")``: the one in config.json, else the type of the first tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floats = (torch.float32, torch.float16, torch.bfloat16)
    return next((t for t in map(checkpoint.dtype, checkpoint.names) if t in floats), torch.bfloat16)


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._buffers[leaf] = value


def empty(module: nn.Module) -> None:
    """Replace a module's parameters by ones without memory."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
