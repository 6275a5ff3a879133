"""Counts the memory of forward and backward passes with fake tensors (shapes without data), on any machine.

It runs the model's own code with lowdft's rows, attention and head, peft's or the fused LoRA layers, and bitsandbytes'
4-bit functions. The storage of every tensor counts for as long as it is alive. Memory that kernels allocate internally
is added if it is large.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedConfig

from lowdft.compat import checkpoint_layers
from lowdft.config.sections import AdapterSection, ModelSection
from lowdft.config.training import DFTConfig
from lowdft.logprobs import Group, bare, chunk_for, layers_in, packed_attention, score
from lowdft.logprobs import attention as packed
from lowdft.models.adapters import without_input_casts
from lowdft.models.fake_model import fake_model
from lowdft.models.fused_lora import fused_lora
from lowdft.models.safeguards import train_in_float32

BLOCK = 512  # bytes that the CUDA allocator rounds up to
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PassMemory:
    """Bytes of the model's `weights`, of the `trained` ones among them, and of the peak of a pass on top of them
    (`peak`, without gradients of weights). `offloaded` bytes went to CPU memory. `trainable` is a number of weights.
    """

    weights: float
    trained: float
    trainable: float
    peak: float
    offloaded: float = 0.0

    def plus(self, other: PassMemory, times: float) -> PassMemory:
        """self + times * (self - other): extrapolates to more layers, from two models that differ in their layers."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return PassMemory(*(a + times * (a - b) for a, b in pairs))


def pass_memory(
    config: PreTrainedConfig,
    model: ModelSection,
    adapter: AdapterSection | None,
    args: DFTConfig,
    groups: Sequence[Group],
    backward: bool = True,
    on_gpu: bool = False,
    lift: bool = True,
) -> PassMemory:
    """Memory of one pass over all groups, measured with few layers; each further layer takes as much as the last one.

    Args:
        backward: with gradients; otherwise as in evaluation.
        on_gpu: `offload_checkpoints` has an effect, and logits are computed in the chunks of a GPU.
        lift: convert trained bfloat16 weights to float32, as the trainer does unless they are sharded.
    """
    layers, settings = config.get_text_config().num_hidden_layers, (backward, on_gpu, lift)
    every = (args.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1)
    few, more = every + 1, 2 * every + 1
    if layers <= more:
        return simulate(config, model, adapter, args, groups, layers, *settings)
    two, three = (simulate(config, model, adapter, args, groups, n, *settings) for n in (few, more))
    return three.plus(two, (layers - more) / every)


def simulate(
    config: PreTrainedConfig,
    model: ModelSection,
    adapter: AdapterSection | None,
    args: DFTConfig,
    groups: Sequence[Group],
    layers: int,
    backward: bool = True,
    on_gpu: bool = False,
    lift: bool = True,
) -> PassMemory:
    """See `pass_memory`, for a model with `layers` layers."""
    dtype = getattr(torch, model.dtype)
    with LiveBytes() as count, FakeTensorMode():
        policy = fake_model(config, layers, dtype, model.holds_4bit, adapter)
        lifted = lift and train_in_float32(policy)
        _checkpoint(bare(policy), args)
        vocabulary = len(bare(policy).get_output_embeddings().weight)
        chunk = args.logits_chunk_size or chunk_for(vocabulary, "cuda" if on_gpu else "cpu")
        trained = [p for p in policy.parameters() if p.requires_grad]
        weights = count.live
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        before, away = count.begin(), _Offload()
        offload = away.hooks() if args.offload_checkpoints and on_gpu else contextlib.nullcontext()
        with _as_in_training(policy, torch.bfloat16 if lifted else None), packed_attention(bare(policy)), offload:
            with torch.set_grad_enabled(backward):
                loss = score(policy, groups, chunk_size=chunk).logps_C.sum()
            if backward:
                loss.backward()
        sizes = [(p.numel(), p.numel() * p.element_size()) for p in trained]
        numbers, trained_bytes = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
        return PassMemory(weights, trained_bytes, numbers, count.peak - before, away.bytes)


def simulate_generation(
    config: PreTrainedConfig,
    model: ModelSection,
    layers: int,
    prompts: int,
    samples: int,
    prompt_tokens: int,
    new_tokens: int,
) -> tuple[float, float]:
    """Peak bytes, including weights, of generating a padded batch: of its prompts (each once) and the last token."""
    dtype, total = getattr(torch, model.dtype), prompt_tokens + new_tokens
    attention = mock.patch.object(nn.functional, "scaled_dot_product_attention", _efficient_attention)
    with LiveBytes() as count, FakeTensorMode(), torch.no_grad(), attention:
        base = fake_model(config, layers, dtype, model.holds_4bit, None).eval()
        text = base.config.get_text_config(decoder=True)
        count.begin()
        cache = DynamicCache(config=text)

        def forward(ids: Tensor, first: int) -> Tensor:
            places = torch.arange(first, first + ids.shape[1])[None].expand(len(ids), -1)
            seen = torch.ones(len(ids), 1, ids.shape[1], first + ids.shape[1], dtype=torch.bool)
            kinds = getattr(text, "layer_types", None)
            mask = dict.fromkeys(kinds, seen) if kinds else seen
            return base(ids, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1).logits

        forward(torch.zeros(prompts, prompt_tokens, dtype=torch.int64), 0)
        prefill = count.peak
        count.begin()
        for layer in cache.layers:  # as long as they become
            shape = (samples, layer.keys.shape[1], total - 1, layer.keys.shape[3])
            layer.keys, layer.values = (torch.empty(shape, dtype=dtype) for _ in range(2))
        logits = forward(torch.zeros(samples, 1, dtype=torch.int64), total - 1)
        scores = logits[:, -1].to(torch.float32, copy=True)  # as `generate` does
        torch.full_like(scores, 0.0)
        return prefill, count.peak


class _Offload:
    """Simulates `save_on_cpu`: saved tensors are moved to CPU memory, and copied back as new tensors."""

    def __init__(self):
        self.bytes = 0

    def hooks(self):
        """The context in which it happens."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple:
        self.bytes += tensor.nbytes
        return tensor.shape, tensor.stride(), tensor.dtype

    def _unpack(self, packed: tuple) -> Tensor:
        return torch.empty_strided(packed[0], packed[1], dtype=packed[2])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._sizes = 0, 0, {}

    def begin(self) -> int:
        """Resets the peak; returns the bytes of live storages."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self.live + _inside(func, args))
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.live += self._sizes[key]
            weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _inside(func, args) -> int:
    """Bytes that a kernel allocates temporarily."""
    name = func._schema.name
    if name == "aten::logsumexp":  # the exponentials
        return args[0].nbytes
    if name == "aten::_scaled_dot_product_efficient_attention_backward":  # the queries' gradients in float32
        return 4 * args[1].numel()
    if name == "bitsandbytes::gemm_4bit":  # the weight, and its scales
        weights = args[2].numel() if isinstance(args[2], Tensor) else args[2][0] * args[2][1]
        return weights * args[0].element_size() + 4 * weights // args[4]
    return 0


def _efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **settings) -> Tensor:
    """Attention as GPUs compute it: no scores in memory."""
    if q.shape[1] != k.shape[1]:  # the kernel's own copies
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if torch.is_autocast_enabled("cpu"):
        q, k, v, attn_mask = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v, attn_mask))
    mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, torch.is_grad_enabled())[0]


@contextlib.contextmanager
def _as_in_training(policy: nn.Module, layers_dtype: torch.dtype | None) -> Iterator[None]:
    half = layers_dtype or policy.get_output_embeddings().weight.dtype in HALF
    with contextlib.ExitStack() as stack:
        # attention as on a GPU, also for a CPU in bfloat16, which keeps up to 4% less
        stack.enter_context(mock.patch.object(packed, "takes_cpu", lambda q: False))
        stack.enter_context(mock.patch.object(nn.functional, "scaled_dot_product_attention", _efficient_attention))
        stack.enter_context(fused_lora(policy))
        stack.enter_context(layers_in(layers_dtype))
        if half and hasattr(policy, "peft_config"):
            stack.enter_context(without_input_casts(policy))
        yield


def _checkpoint(model: nn.Module, args: DFTConfig) -> None:
    if args.gradient_checkpointing:
        checkpoint_layers(model, args.gradient_checkpointing_kwargs or {})
        model.enable_input_require_grads()
