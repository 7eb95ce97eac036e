"""Continuous batching: transformers' manager, with a step of our own. With `serve.attention` the only file that
knows its insides.

The manager keeps the queue, the schedule, the paged KV cache and its prefix blocks, and a thread that steps. Ours is
what happens in a step (`Step`): which experts may work on which tokens, which positions' logits are needed, and what
the next tokens are. A sequence is known to the manager by its id alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

from flexmore_ray.modeling import FlexMoreForCausalLM
from serve import attention
from serve.request import EngineFailed

_LARGEST_ID = 2**31 - 1  # token ids are hashed as 32-bit integers


class Slice(NamedTuple):
    """The part of one sequence that a step computes."""

    id: str
    start: int
    """Position of its first token."""
    length: int
    is_last: bool
    """Whether its last token's logits choose the next one; False while the prompt is read in parts."""


class Step(Protocol):
    """What the runner asks of the engine in every step."""

    def wanted(self, slices: Sequence[Slice]) -> list[int]:
        """Positions in the batch (0 is the first token of the first slice) whose logits are needed, in order."""

    def forward(self, model: FlexMoreForCausalLM, slices: Sequence[Slice], inputs: Mapping[str, Any]) -> Tensor:
        """Run the model; returns the logits (wanted positions, V)."""

    def choose(self, slices: Sequence[Slice], logits: Tensor) -> list[tuple[int, bool]]:
        """For each slice with `is_last` its next token, and whether the sequence ends with it."""

    def salt(self, id: str) -> int | None:
        """Only sequences of equal salt share keys and values; None shares with nobody."""

    def failed(self, id: str, error: str) -> None:
        """The manager gave a sequence up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Sizes of the batch and of the KV cache."""

    sequences: int
    """Sequences in one batch at most."""
    batch_tokens: int
    """Tokens in one step at most."""
    page: int
    """Tokens of a page, the unit in which prefixes are shared."""
    pages: int | None
    """None means as many as the memory of the device allows."""


class BatchRunner:
    """Steps a model over all sequences that are added, in a thread.

    Args:
        model: in evaluation mode.
        step: asked and told in the thread.
        size: of the batch and the cache.
        vocab_size: token ids are below it.
    """

    def __init__(self, model: FlexMoreForCausalLM, step: Step, size: CacheSize, vocab_size: int) -> None:
        config = ContinuousBatchingConfig(
            page_size=size.page,
            num_blocks=size.pages,
            max_batch_tokens=size.batch_tokens,
            max_requests_per_batch=size.sequences,
            use_cuda_graph=False,  # which experts work, and so which kernels run, depends on the tokens
            use_async_batching=False,
        )
        # Ends are ours to see: the manager is given none.
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        self._manager = _Manager(model, generation, config, step, vocab_size)

    def start(self) -> None:
        """Start the thread."""
        self._manager.start()

    def stop(self) -> None:
        """End the thread; sequences that are not finished fail."""
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=30, hard_stop=True)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._manager.is_running() and self._manager.background_thread_status.fatal_error is None

    def add(self, id: str, token_ids: Sequence[int]) -> None:
        """Add a sequence: prompt tokens, at least one. It goes on until `Step.choose` ends it.

        Raises:
            EngineFailed: the thread has ended.
        """
        if self._manager.add_request(list(token_ids), request_id=id, max_new_tokens=None, eos_token_id=-1) is None:
            raise EngineFailed("the engine has stopped")

    def cancel(self, id: str) -> None:
        """Drop a sequence before the next step."""
        self._manager.cancel_request(id)

    def usage(self) -> tuple[int, int, float, float]:
        """Sequences running, sequences waiting, and the shares of the cache that sequences hold and that is kept.

        What is kept are prefixes of sequences that have ended, for others to begin with; they make room when needed.
        """
        processor = self._manager.batch_processor
        if processor is None:
            return 0, 0, 0.0, 0.0
        scheduler, cache = processor.scheduler, processor.cache
        waiting = len(scheduler.waiting_requests) + self._manager.input_queue.qsize()
        allocators = cache.cache_allocators.values()
        size = cache.num_sectors * cache.bytes_per_sector
        kept = sum(len(allocator.ledger.cached_blocks) * allocator.bytes_per_block for allocator in allocators)
        held = max(0.0, size - cache.compute_free_capacity(relative=False) - kept)  # blocks may move while we count
        return len(scheduler.active_requests), waiting, held / size, kept / size


class _Manager(ContinuousBatchingManager):
    def __init__(self, model: Any, generation: Any, config: Any, step: Step, vocab_size: int) -> None:
        super().__init__(model, generation, config)
        self._step, self._vocab_size = step, vocab_size
        self.output_router = _Router(step.failed)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)
        before = model.config._attn_implementation
        if before in ("sdpa", "paged|eager"):
            self._original_attn_impl = self._original_attn_impl or before
            model.set_attn_implementation(attention.NAME)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        runner = processor.model_runner
        processor.model_runner = _Runner(
            logit_processor=runner.logit_processor,
            cb_config=runner.cb_config,
            inputs_and_outputs=runner.inputs_and_outputs,
            cache=runner.cache,
            do_sample=False,
            return_logprobs=False,
            step=self._step,
        )
        _share_by_salt(processor.cache, self._step.salt, self._vocab_size)
        return processor


class _Router(OutputRouter):
    """Tokens were handed on in the step itself; only failures are news."""

    def __init__(self, failed: Callable[[str, str], None]) -> None:
        super().__init__()
        self._failed = failed

    def deliver(self, output: GenerationOutput) -> None:
        if output.error is not None:
            self._failed(output.request_id, output.error)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class _Runner(ModelRunner):
    def __init__(self, *, step: Step, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._step = step

    def compute_batch(self, model: Any, batch_data: dict[str, Any]) -> None:
        outputs = cast("ContinuousBatchingIOs", self.inputs_and_outputs)
        batch = outputs.requests_in_batch
        slices = []
        for future in batch:  # positions were moved on already
            start = future.state.position_offset - future.query_length
            slices.append(Slice(future.state.request_id, start, future.query_length, future.has_new_token))
        device = batch_data["input_ids"].device
        inputs = batch_data | {
            "logits_to_keep": torch.tensor(self._step.wanted(slices), dtype=torch.long, device=device)
        }
        if model.config._attn_implementation == attention.NAME:
            lengths, keys = zip(*((part.length, part.start + part.length) for part in slices), strict=True)
            inputs["segments"] = attention.Segments.of(lengths, keys, batch_data["read_index"][0])
        logits = self._step.forward(model, slices, inputs)
        chosen = self._step.choose(slices, logits)
        states = [future.state for future in batch if future.has_new_token]
        for state, (token, is_end) in zip(states, chosen, strict=True):
            if is_end:
                state._eos_token_ids.add(token)
        tokens = torch.tensor([token for token, _ in chosen], dtype=torch.int32)
        outputs.output_ids[0, : len(tokens)].copy_(tokens)


def _share_by_salt(cache: PagedAttentionCache, salt: Callable[[str], int | None], vocab_size: int) -> None:
    """Let only sequences of equal salt share blocks: the salt is hashed with the tokens."""
    search, mark = cache.search_prefix_match, cache.mark_complete_blocks

    def salted(id: str, token_ids: list[int]) -> list[int] | None:
        number = salt(id)
        if number is None or (number + 1) * vocab_size > _LARGEST_ID:
            return None
        return [token + number * vocab_size for token in token_ids] if number else token_ids

    def search_salted(request_id: str, prompt_ids: list[int]) -> int:
        token_ids = salted(request_id, prompt_ids)
        return 0 if token_ids is None else search(request_id, token_ids)

    def mark_salted(state: RequestState, complete_blocks: dict[str, int]) -> None:
        if not complete_blocks or salt(state.request_id) is None:
            return
        token_ids = salted(state.request_id, state.initial_tokens + state.generated_tokens)
        if token_ids is None:
            return
        mark(_Tokens(state.request_id, token_ids, state.status), complete_blocks)  # type: ignore[arg-type]

    cache.search_prefix_match = search_salted  # type: ignore[method-assign]
    cache.mark_complete_blocks = mark_salted  # type: ignore[method-assign]


class _Tokens:
    """What marking blocks reads of a sequence's state."""

    def __init__(self, request_id: str, token_ids: list[int], status: Any) -> None:
        self.request_id, self.initial_tokens, self.status = request_id, token_ids, status
        self.generated_tokens: list[int] = []
