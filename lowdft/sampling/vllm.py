"""Sampling with vLLM in a child process, so that its GPU memory is freed when the sampler ends.

If the recipe has the base in 4 bit, vLLM quantizes it while loading (NF4, but without double quantization).
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from lowdft.errors import UserError
from lowdft.sampling.draw import Request, Sample, SamplingSettings

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank
SAMPLES_AT_WORK = 256


@dataclass(frozen=True)
class VllmModel:
    """The model that vLLM loads.

    Args:
        path, revision: where the base is.
        dtype: the dtype in which it computes.
        load_in_4bit: quantize the base to NF4.
        max_length: maximum tokens of prompt and answer, for the size of the cache; None means the model's context.
        memory: share of the GPU's memory for vLLM.
        adapter: the folder of a LoRA adapter.
    """

    path: str
    revision: str | None = None
    dtype: str = "bfloat16"
    load_in_4bit: bool = False
    max_length: int | None = None
    memory: float = 0.9
    adapter: str | None = None
    trust_remote_code: bool = False

    def engine_arguments(self, samples: int) -> dict:
        """The arguments of `vllm.LLM`, with `samples` at work at once."""
        arguments = {
            "model": self.path,
            "revision": self.revision,
            "dtype": self.dtype,
            "max_num_seqs": samples,
            "max_model_len": self.max_length,
            "gpu_memory_utilization": self.memory,
            "trust_remote_code": self.trust_remote_code,
            "generation_config": "vllm",  # its own: the model's may hold a repetition penalty
        }
        if self.load_in_4bit:
            arguments["quantization"] = "bitsandbytes"
        if self.adapter:
            arguments |= {"enable_lora": True, "max_lora_rank": served_rank(self.adapter)}
        return arguments


def served_rank(adapter: str | Path) -> int:
    """The max_lora_rank that vLLM needs for an adapter.

    Raises:
        UserError: the adapter is not plain LoRA, or its rank is too high for vLLM.
    """
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        raise UserError(f"{adapter}: vLLM serves plain LoRA; merge the adapter, or use another backend")
    if config.get("modules_to_save"):
        raise UserError(f"{adapter}: vLLM does not load modules_to_save; merge the adapter, or use another backend")
    rank = next((rank for rank in RANKS if rank >= config["r"]), None)
    if rank is None:
        raise UserError(f"{adapter}: its rank is {config['r']}, but vLLM allows {RANKS[-1]} at most; merge the adapter")
    return rank


class VllmSampler:
    """vLLM, offline. It uses its own random numbers, seeded per request, and its own arithmetic, so its samples differ
    from those of the other backends.

    The child process starts with the first request and ends with this object.
    """

    def __init__(self, model: VllmModel, end_ids: list[int], settings: SamplingSettings, batch_size: int | None):
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                'negatives.backend is vllm, which is not installed: pip install "lowdft[vllm]", '
                "or set negatives.backend=padded"
            )
        common = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "max_tokens": settings.max_new_tokens,
            "stop_token_ids": end_ids,
            "stop": list(settings.stop),
        }
        self.job = (model.engine_arguments(batch_size or SAMPLES_AT_WORK), common, model.adapter)
        self.connection: Connection | None = None

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`.

        Raises:
            UserError: vLLM failed, or its process was killed.
        """
        if not requests:
            return []
        if self.connection is None:
            self._start()
        try:
            self.connection.send([(list(request.prompt_ids), request.seed) for request in requests])
            found = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            found = "its process was killed (perhaps there was not enough memory)"
        if isinstance(found, str):
            raise UserError(
                f"vLLM failed: {found}. A smaller negatives.gpu_memory_utilization leaves more for other programs; "
                "negatives.backend=continuous needs no vLLM."
            )
        return [Sample(ids, reason) for ids, reason in found]

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a forked child could not use CUDA
        self.connection, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, *self.job))
        process.start()
        theirs.close()
        self.close = weakref.finalize(self, _end, self.connection, process)


def _end(connection: Connection, process) -> None:
    connection.close()  # the child reads its end and leaves
    process.join(60)
    if process.is_alive():
        process.kill()
        process.join()


def _serve(connection: Connection, engine_arguments: dict, common: dict, adapter: str | None) -> None:
    """The child process: maps lists of (prompt ids, seed) to lists of (token ids, finish reason), or to an error."""
    try:
        import vllm
        from vllm.lora.request import LoRARequest

        engine = vllm.LLM(**engine_arguments)
        lora = LoRARequest("adapter", 1, str(Path(adapter).resolve())) if adapter else None
        while True:
            requests = connection.recv()
            prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
            params = [vllm.SamplingParams(seed=seed, **common) for _, seed in requests]
            outputs = [result.outputs[0] for result in engine.generate(prompts, params, lora_request=lora)]
            # Its own word for why: it also stops at the end tokens of the model's generation settings.
            connection.send([(list(output.token_ids), output.finish_reason) for output in outputs])
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
