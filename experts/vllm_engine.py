"""vLLM behind the few calls that this project makes: the only module that knows it.

An engine runs in processes of its own.  Its event loop lives in a thread, so that callers stay ordinary functions and
any number of threads may call at once: vLLM batches what comes together.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from experts.config import EngineConfig
from experts.kv_cache import is_recurrent, new_cache
from experts.loading import ModelError
from experts.relay import relayed
from experts.vllm_install import ENVIRONMENT, check_installed

T = TypeVar("T")
HEALTH_S = 1.0
CLOSE_S = 60.0
ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
EMPTY = hashlib.sha256(b"").hexdigest()


class EngineDiedError(RuntimeError):
    """An engine whose process is gone; only a new one can go on."""


@dataclass(frozen=True, slots=True)
class Sample:
    """tokens: sampled ones, an end token included; logprobs: of each under the distribution it was drawn from."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


class VllmEngine:
    """One vLLM engine: made when this returns, ended by `close`.

    Args:
        runner: `generate` samples answers, `pooling` gives hidden states.
        pooling: which states: the last or the first token's, their mean, or all of them.
        on_death: called once, from another thread, when the engine's process is gone.
        adapter_rank: of the LoRA adapters that requests may bring; None takes none.
        embeds: whether prompts may be embeddings; where they may, models whose layers look ids up get none from vLLM.
    """

    def __init__(
        self,
        path: str,
        config: EngineConfig,
        runner: Literal["generate", "pooling"],
        pooling: Literal["last", "first", "mean", "all"] = "last",
        threads: int = 0,
        on_death: Callable[[], None] | None = None,
        seed: int = 0,
        adapter_rank: int | None = None,
        embeds: bool = True,
    ) -> None:
        check_installed()
        os.environ.update(ENVIRONMENT)
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        self.path, self.pooling, self.dead = path, pooling, False
        self._on_death, self._numbers, self._closing = on_death, itertools.count(), False
        self._adapter_rank, self._adapter_ids, self._embeds = adapter_rank, dict[Path, int](), embeds
        self.under_way, self.streamed = 0, 0  # streams, and tokens sampled for them so far
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._engine = self._wait(self._start(config, runner, seed))
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        self._health = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    async def _start(self, config: EngineConfig, runner: str, seed: int) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        on_gpu = bool(config.gpus) and torch.cuda.is_available()
        eager = config.eager if config.eager is not None else not on_gpu
        arguments: dict[str, Any] = {
            "model": self.path,
            "dtype": config.dtype,
            "seed": seed,
            "runner": runner,
            "enforce_eager": eager,
            "max_model_len": config.max_model_tokens,
            "tensor_parallel_size": config.tensor_parallel,
            "disable_log_stats": True,
            "generation_config": "vllm",
        }
        if runner == "generate":
            # Log-probabilities as they were sampled from, temperature included.
            arguments |= {"enable_prompt_embeds": self._embeds, "logprobs_mode": "processed_logprobs"}
        else:
            arguments |= _pooler(self.pooling)
        if self._adapter_rank is not None:
            fitting = [rank for rank in ADAPTER_RANKS if rank >= self._adapter_rank]
            arguments |= {"enable_lora": True, "max_lora_rank": fitting[0], "max_loras": 4, "max_cpu_loras": 8}
        if on_gpu:
            arguments["gpu_memory_utilization"] = config.memory_share
        else:
            # A prompt in pieces loses its seed on CPU (vLLM 0.32 turns back generators that cannot turn back).
            longest = config.max_model_tokens or 0
            arguments |= {
                "kv_cache_memory_bytes": int(config.kv_cache_gb * 2**30),
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(8192, longest),
                "max_num_seqs": 1024,
            }
            if _is_recurrent(self.path):  # their states are found again only where prompts come in pieces
                arguments["enable_prefix_caching"] = False
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except (ValueError, RuntimeError, OSError) as error:
            raise ModelError(f"model {self.path!r}: vLLM cannot start it: {_reason(error)}") from error

    def generate(
        self,
        prompts: Sequence[Tensor | Sequence[int]],
        samples: int,
        temperature: float,
        max_new_tokens: int,
        end_tokens: Sequence[int],
        seeds: Sequence[int] | None,
        adapter: Path | None = None,
        stop: Sequence[str] = (),
    ) -> list[list[Sample]]:
        """Several answers to every prompt.

        Args:
            prompts: (tokens, width) embeddings or the token ids of each, never a mixture, whose mask vLLM's prefix
                cache does not see (vLLM issue 56655).
            seeds: one a prompt; None where sampling is greedy.
            adapter: folder of a LoRA adapter; equal folders must hold equal ones.
            stop: texts that end an answer; vLLM sees some only with a later token, when its characters are whole.

        Raises:
            EngineDiedError: when the engine's process is gone.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def sampling(seed: int | None) -> Any:
            return SamplingParams(
                n=samples,
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=seed,
                logprobs=0,
                stop_token_ids=list(end_tokens),
                ignore_eos=True,  # the stop tokens are all there is
                output_kind=RequestOutputKind.FINAL_ONLY,
                **_stopping(stop),
            )

        lora = None if adapter is None else self._adapter(adapter)

        async def one(prompt: Tensor | Sequence[int], seed: int | None) -> list[Sample]:
            last = None
            kind = "prompt_embeds" if isinstance(prompt, Tensor) else "prompt_token_ids"
            asked = {kind: prompt if isinstance(prompt, Tensor) else list(prompt)}
            number = str(next(self._numbers))
            async for output in self._engine.generate(asked, sampling(seed), number, lora_request=lora):
                last = output
            assert last is not None
            return [_sample(made) for made in sorted(last.outputs, key=lambda made: made.index)]

        async def every() -> list[list[Sample]]:
            each = seeds if seeds is not None else [None] * len(prompts)
            return await _together([one(p, s) for p, s in zip(prompts, each, strict=True)])

        return self._asked(every())

    async def stream(
        self,
        prompt: Tensor,
        samples: int,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        end_tokens: Sequence[int],
        seed: int,
        adapter: Path | None = None,
        stop: Sequence[str] = (),
    ) -> AsyncGenerator[tuple[int, Sample, bool | None]]:
        """One prompt's samples as they are made: which one, what is new, and at its end whether it stopped by itself.

        A caller that stops listening ends the engine's request.

        Raises:
            EngineDiedError: when the engine's process is gone.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        if self.dead:
            raise EngineDiedError(f"the vLLM engine of {self.path} is gone")
        sampling = SamplingParams(
            n=samples,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_new_tokens,
            seed=seed if temperature else None,
            logprobs=0,
            stop_token_ids=list(end_tokens),
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            **_stopping(stop),
        )
        lora = None if adapter is None else self._adapter(adapter)
        asked = {"prompt_embeds": prompt}
        number = f"stream-{next(self._numbers)}"
        made = relayed(lambda: self._engine.generate(asked, sampling, number, lora_request=lora), self._loop)
        self.under_way += 1
        try:
            async with contextlib.aclosing(made):
                async for output in made:
                    for new in output.outputs:
                        self.streamed += len(new.token_ids)
                        yield new.index, _new(new), None if new.finish_reason is None else new.finish_reason == "stop"
        except EngineDeadError as error:
            self._died()
            raise EngineDiedError(f"the vLLM engine of {self.path} died: {error}") from error
        finally:
            self.under_way -= 1

    def _adapter(self, folder: Path) -> Any:
        from vllm.lora.request import LoRARequest

        number = self._adapter_ids.setdefault(folder, len(self._adapter_ids) + 1)
        return LoRARequest(lora_name=folder.name, lora_int_id=number, lora_path=str(folder))

    def states(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """(tokens, width) float32 last-layer states of every prompt, after the final norm.

        One row a prompt, unless `pooling` is all.

        Raises:
            EngineDiedError: when the engine's process is gone.
        """
        from vllm import PoolingParams

        task: Any = "token_embed" if self.pooling == "all" else "embed"

        async def one(tokens: Sequence[int]) -> np.ndarray:
            parameters = PoolingParams(task=task, use_activation=False)
            prompt = {"prompt_token_ids": list(tokens)}
            last = None
            async for output in self._engine.encode(prompt, parameters, str(next(self._numbers))):
                last = output
            assert last is not None
            data = last.outputs.data.float().cpu().numpy()
            return data.reshape(-1, data.shape[-1])

        async def every() -> list[np.ndarray]:
            return await _together([one(prompt) for prompt in prompts])

        return self._asked(every())

    def sha256(self) -> str:
        """Hash of the weights that the engine's processes hold now; see `_probe` for what they do not show."""
        found = self._asked(self._engine.compute_weight_checksums())
        named = {name: digest for worker in found for name, digest in worker.items()}
        probe = self._probe() if EMPTY in named.values() else ""
        return hashlib.sha256(json.dumps([sorted(named.items()), probe]).encode()).hexdigest()

    def _probe(self) -> str:
        """What the model makes of a fixed prompt: on CPU, weights are packed where no checksum sees them."""
        tokens = list(range(3, 19))
        if self.pooling_only:
            return hashlib.sha256(self.states([tokens])[0].tobytes()).hexdigest()
        self._asked(self._engine.reset_prefix_cache())
        width = self._engine.model_config.get_hidden_size()
        prompt = torch.sin(torch.arange(16 * width, dtype=torch.float32)).view(16, width)
        made = self.generate([prompt.to(self._engine.model_config.dtype)], 1, 0.0, 8, (), None)[0][0]
        return json.dumps([made.tokens, made.logprobs])

    @property
    def pooling_only(self) -> bool:
        """Whether it gives states instead of answers."""
        return self._engine.model_config.runner_type == "pooling"

    def close(self) -> None:
        """Ends the engine's processes."""
        if self._closing:
            return
        self._closing = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout=CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=CLOSE_S)

    async def _end(self) -> None:
        self._engine.shutdown()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _asked(self, work: Coroutine[Any, Any, T]) -> T:
        from vllm.v1.engine.exceptions import EngineDeadError

        if self.dead:
            work.close()
            raise EngineDiedError(f"the vLLM engine of {self.path} is gone")
        try:
            return self._wait(work)
        except EngineDeadError as error:
            self._died()
            raise EngineDiedError(f"the vLLM engine of {self.path} died: {error}") from error

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _watch(self) -> None:
        """Notices a dead engine also when nobody asks it anything."""
        while not self._engine.errored:
            await asyncio.sleep(HEALTH_S)
        self._died()

    def _died(self) -> None:
        if self.dead or self._closing:
            return
        self.dead = True
        if self._on_death is not None:
            self._on_death()


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The values of all; when one fails the others are ended, so that they do not occupy the engine for nobody."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _pooler(pooling: str) -> dict[str, Any]:
    from vllm.config import PoolerConfig

    if pooling == "all":
        return {"pooler_config": PoolerConfig(tok_pooling_type="ALL", use_activation=False), "convert": "embed"}
    kinds: dict[str, Any] = {"last": "LAST", "first": "CLS", "mean": "MEAN"}
    return {"pooler_config": PoolerConfig(seq_pooling_type=kinds[pooling], use_activation=False), "convert": "embed"}


def _stopping(stop: Sequence[str]) -> dict[str, Any]:
    """What makes vLLM look for stop strings, in the same text as `StopStrings`."""
    return {"detokenize": bool(stop), "stop": list(stop), "skip_special_tokens": False}


def _is_recurrent(path: str) -> bool:
    from transformers import AutoConfig

    try:
        return any(map(is_recurrent, new_cache(AutoConfig.from_pretrained(path)).layers))
    except ModelError:  # a kind of layer that is not known
        return True


def _reason(error: Exception) -> str:
    """The last line that says something: pydantic's refer to its documentation."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    return lines[-1].partition(" [type=")[0] if lines else type(error).__name__


def _sample(made: Any) -> Sample:
    if made.finish_reason is None:
        raise RuntimeError("vLLM ended a request early")
    return _new(made)


def _new(made: Any) -> Sample:
    if made.finish_reason not in (None, "stop", "length"):
        raise RuntimeError(f"vLLM ended a request early: {made.finish_reason}")
    tokens = list(made.token_ids)
    logprobs = [position[token].logprob for token, position in zip(tokens, made.logprobs, strict=True)]
    return Sample(tokens, logprobs, made.finish_reason == "stop")
