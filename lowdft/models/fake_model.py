"""Models of fake tensors (shapes without data) as in training, with adapters and 4-bit layers."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lowdft.config.sections import AdapterSection
from lowdft.errors import UserError
from lowdft.models.adapter_fields import new_adapter
from lowdft.models.adapters import adapter_config


def fake_model(
    config: PreTrainedConfig, layers: int, dtype: torch.dtype, in_4bit: bool, adapter: AdapterSection | None
) -> nn.Module:
    """The model as it is trained, with fake weights; call it in a `FakeTensorMode`."""
    if adapter is not None and adapter.type == "shira":
        raise UserError("adapter.type: shira cannot be simulated, because its masks need weights; try lora for `plan`")
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = layers
    if kinds:  # every kind of layer once, as far as possible
        text.layer_types = [*dict.fromkeys(kinds), *kinds][:layers]
    with unset_fake_temporarily(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
        if in_4bit:
            model.is_loaded_in_4bit = True
            _quantize(model, dtype)
        if adapter is not None:
            model.requires_grad_(False)
            model = new_adapter(model, adapter_config(adapter, in_4bit))
    _materialize(model)
    return model.train()


def _materialize(model: nn.Module) -> None:
    """Replaces meta tensors by fake ones; tied tensors stay tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
        return made[id(tensor)]

    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                kind[name] = tensor if tensor is None else fake(tensor)
        if isinstance(module, Linear4bit):
            module.set_state()


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer with a fake weight."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype, self.compute_type_is_set = dtype, True
        self.bias = linear.bias
        self.shape, self.numbers = linear.weight.shape, linear.weight.numel()
        self.weight = nn.Parameter(torch.empty(-(-self.numbers // 2), 1, dtype=torch.uint8), requires_grad=False)
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"

    def set_state(self) -> None:
        """The quantization state: 8-bit scales for 64 weights each, and float32 scales for 256 of those."""
        blocks = -(-self.numbers // 64)
        scales = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        absmax, code, offset = torch.empty(blocks, dtype=torch.uint8), torch.empty(16), torch.empty(())
        self.weight.quant_state = QuantState(absmax, self.shape, code, 64, "nf4", self.compute_dtype, offset, scales)

    def forward(self, x: Tensor) -> Tensor:
        """See bitsandbytes."""
        out = bnb.matmul_4bit(
            x.to(self.compute_dtype), self.weight, bias=self.bias, quant_state=self.weight.quant_state
        )
        return out.to(x.dtype)


def _quantize(model: nn.Module, dtype: torch.dtype) -> None:
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linear4bit(module, dtype))
