"""`MixtureLM`: lm-eval's `LM` interface over a causal language model, computing shared tokens once.

The requests of a task repeat themselves: the choices of one question share the question, the documents of
a task share the few-shot prompt, single-token choices differ in nothing but the token looked up. Here

    requests -> sequences -> rows -> clusters -> batches

A *sequence* is the input of one request, context and continuation without its last token. The sequences of
one document are merged into a *row*: their prefix tree, written down in depth-first order, so that each
distinct prefix of a document is computed once. A token may attend to its ancestors in that tree and to
nothing else. Rows that begin alike form a *cluster*, whose common beginning runs once, at batch size 1, into
a key-value cache that all batches of the cluster read.

    B  rows of a batch      T  tokens of its longest row      P  tokens of the cluster's common beginning
    N  positions whose next token is scored                   V  size of the vocabulary

The scores are those of lm-eval's `HFLM`: same tokens, same truncation, same stop rules.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.utils import (
    configure_pad_token,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import DynamicCache

from flexmore_ray.errors import TaskError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tokens = tuple[int, ...]
Scored = tuple[float, bool]
"""Log-likelihood of a continuation (natural logarithm) and whether greedy decoding would produce it."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Default number of tokens of a batch, by type of device."""
DEFAULT_MAX_NEW_TOKENS = 256
"""Length of a generation whose task sets none; lm-eval's value."""
_CACHED_TOKENS_FACTOR = 4  # keys and values of at most 4 * batch_tokens positions are held at once
_MASK_CELLS = 2**26  # entries of one attention mask, 256 MiB in float32
_LONGEST_ROW = 2**13  # tokens of a row with branches: its mask is square
_LOGIT_CELLS = 2**28  # entries of the logits of one batch, 1 GiB in float32
_CLUSTER_COST = 512  # tokens that a cluster of its own must save: one more, and smaller, forward pass
_PLANS_KEPT = 256
_NEUTRAL_GENERATION = {  # settings of a generation configuration that leave greedy decoding as it is
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("use_cache", "cache_implementation", "return_dict_in_generate", "trust_remote_code"),
    *("output_attentions", "output_hidden_states"),
}


# --- rows: the prefix tree of the sequences of one document -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Query:
    """One distinct request: the tokens read, and the tokens to predict after the last `len(targets)`."""

    inputs: Tokens
    targets: Tokens
    document: Any


@dataclasses.dataclass
class _Row:
    """A prefix tree in depth-first order.

    Token j is an ancestor of token i (or i itself) exactly if `j <= i < ends[j]`. `depths` are the positions
    of the tokens in their sequences. `scored` lists (query, tokens whose successor is scored, targets).
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    scored: list[tuple[int, list[int], Tokens]]

    @property
    def is_chain(self) -> bool:
        """Whether nothing branches, so that ordinary causal attention does."""
        return all(end == len(self.tokens) for end in self.ends)

    @property
    def sharable(self) -> int:
        """Number of leading tokens that may be cut off: nothing branches or is scored among them."""
        first_scored = min(nodes[0] for _, nodes, _ in self.scored)
        branch = next((i for i, end in enumerate(self.ends) if end != len(self.tokens)), len(self.tokens))
        return min(first_scored, branch)

    @property
    def num_scored(self) -> int:
        return sum(len(nodes) for _, nodes, _ in self.scored)

    def without(self, prefix: int) -> _Row:
        """The same row without its first `prefix` tokens."""
        if not prefix:
            return self
        scored = [(query, [node - prefix for node in nodes], targets) for query, nodes, targets in self.scored]
        ends = [end - prefix for end in self.ends[prefix:]]
        return _Row(self.tokens[prefix:], self.depths[prefix:], ends, scored)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    return next(i for i in range(shortest) if a[i] != b[i])


def _build_rows(queries: Sequence[_Query], *, branching: bool, longest: int) -> list[_Row]:
    """The queries as rows, each document's together.

    A sequence joins the row of its neighbour when at least half of it is there already and the row stays
    within `longest` tokens; without `branching` only when it continues that neighbour, so that every row is a
    plain sequence.
    """
    by_document: dict[Any, list[int]] = {}
    for index, query in enumerate(queries):
        by_document.setdefault(query.document, []).append(index)
    rows: list[_Row] = []
    for indices in by_document.values():
        indices.sort(key=lambda i: queries[i].inputs)
        rows.extend(_document_rows(queries, indices, branching, longest))
    return rows


def _document_rows(queries: Sequence[_Query], indices: Sequence[int], branching: bool, longest: int) -> Iterator[_Row]:
    row = _Row([], [], [], [])
    path: list[int] = []  # tree nodes of the previous sequence
    previous: Tokens = ()
    for index in indices:
        inputs, targets = queries[index].inputs, queries[index].targets
        shared = _common_prefix(previous, inputs)
        joins = 2 * shared >= len(inputs) if branching else shared == len(previous)
        if row.tokens and not (joins and len(row.tokens) + len(inputs) - shared <= longest):
            yield _closed(row, path)
            row, path, shared = _Row([], [], [], []), [], 0
        for node in path[shared:]:
            row.ends[node] = len(row.tokens)
        path = path[:shared] + list(range(len(row.tokens), len(row.tokens) + len(inputs) - shared))
        row.tokens.extend(inputs[shared:])
        row.depths.extend(range(shared, len(inputs)))
        row.ends.extend([0] * (len(inputs) - shared))
        row.scored.append((index, path[len(inputs) - len(targets) :], targets))
        previous = inputs
    yield _closed(row, path)


def _closed(row: _Row, path: Sequence[int]) -> _Row:
    for node in path:
        row.ends[node] = len(row.tokens)
    return row


# --- clusters: rows that begin alike ----------------------------------------------------------------------


def _find_clusters(beginnings: Sequence[Tokens]) -> list[tuple[list[int], int]]:
    """Group sequences so that running each group's common prefix once saves the most tokens.

    Args:
        beginnings: The part of each row that may be cut off.

    Returns:
        Pairs of member indices and length of their common prefix; each index is in exactly one pair, and
        those that share too little to pay for a pass of their own are in one pair of prefix 0.
    """
    order = sorted(range(len(beginnings)), key=lambda i: beginnings[i])
    common = [0] + [_common_prefix(beginnings[a], beginnings[b]) for a, b in itertools.pairwise(order)]
    step = max(1, max(common, default=0) // 64)  # at most 64 lengths, hence levels of recursion, are tried
    found = _best_split([length // step * step for length in common], 0, len(order))[1]
    clusters = [(order[low:high], min(common[low + 1 : high])) for low, high in found]
    grouped = set(itertools.chain.from_iterable(members for members, _ in clusters))
    rest = [index for index in range(len(beginnings)) if index not in grouped]
    return clusters + ([(rest, 0)] if rest else [])


def _best_split(common: Sequence[int], low: int, high: int) -> tuple[int, list[tuple[int, int]]]:
    """The clusters within [low, high) of sorted sequences, and the tokens they save."""
    if high - low < 2:
        return 0, []
    shared = min(common[low + 1 : high])
    cuts = [low, *(i for i in range(low + 1, high) if common[i] == shared), high]
    parts = [_best_split(common, a, b) for a, b in itertools.pairwise(cuts)]
    saved_apart = sum(saved for saved, _ in parts)
    saved_together = shared * (high - low - 1) - _CLUSTER_COST
    if saved_together > 0 and saved_together >= saved_apart:
        return saved_together, [(low, high)]
    return saved_apart, [cluster for _, clusters in parts for cluster in clusters]


# --- plans: everything about a list of requests that does not depend on the weights -----------------------


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Rows padded on the right, as tensors.

    tokens, positions (B, T); ends (B, T), or None where no row branches; at (N,) the scored positions in the
    flattened batch; picks, targets, queries (M,): for each token of each continuation its place in `at`, its
    id, and its query.
    """

    tokens: Tensor
    positions: Tensor
    ends: Tensor | None
    at: Tensor
    picks: Tensor
    targets: Tensor
    queries: Tensor


@dataclasses.dataclass(frozen=True)
class _Cluster:
    prefix: Tokens
    batches: list[_Batch]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """`answers[i]` is the query that answers request i; `num_queries` distinct ones in all."""

    answers: list[int]
    num_queries: int
    clusters: list[_Cluster]


def _pad_batch(rows: Sequence[_Row], prefix: int) -> _Batch:
    width = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.arange(prefix, prefix + width).repeat(len(rows), 1)
    ends = torch.full((len(rows), width), width)  # padding sees itself: no row of the mask is empty
    places: dict[int, int] = {}
    picks: list[int] = []
    targets: list[int] = []
    queries: list[int] = []
    for i, row in enumerate(rows):
        length = len(row.tokens)
        tokens[i, :length] = torch.tensor(row.tokens)
        positions[i, :length] = torch.tensor(row.depths)
        ends[i, :length] = torch.tensor(row.ends)
        for query, nodes, wanted in row.scored:
            picks.extend(places.setdefault(i * width + node, len(places)) for node in nodes)
            targets.extend(wanted)
            queries.extend([query] * len(wanted))
    return _Batch(
        tokens=tokens,
        positions=positions,
        ends=None if all(row.is_chain for row in rows) else ends,
        at=torch.tensor(list(places)),
        picks=torch.tensor(picks),
        targets=torch.tensor(targets),
        queries=torch.tensor(queries),
    )


def _take_while_fits(items: Sequence[Any], fits: Callable[[Sequence[Any]], bool]) -> Iterator[Sequence[Any]]:
    """Split into runs, each as long as it `fits`, but never empty."""
    start = 0
    for stop in range(1, len(items) + 1):
        if stop - start > 1 and not fits(items[start:stop]):
            yield items[start : stop - 1]
            start = stop - 1
    if start < len(items):
        yield items[start:]


# --- the model --------------------------------------------------------------------------------------------


class MixtureLM(LM):
    """A causal language model as lm-eval sees it, with the scores of `HFLM` and less work.

    Prefix trees need a model that takes a 4-D attention mask (attention implementation `sdpa` or `eager`),
    has rotary positions and full attention in every layer. Others are scored one plain sequence per row:
    slower, same scores. What was planned for a list of requests (tokens, rows, batches) is remembered, so
    scoring them again after the model changed, as a grid of mixtures does, costs forward passes only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: A transformers causal language model; it is set to evaluation mode.
            tokenizer: Its tokenizer; one without a padding token is given one, by lm-eval's rule.
            batch_tokens: Tokens of one forward pass, padding included, >= 1; bounds the memory taken.
                None: 2048 on a CPU, 32768 on a GPU.
            max_length: Longest input in tokens, >= 2; longer ones lose tokens on the left. None: what the
                model's configuration says.

        Raises:
            ValueError: `batch_tokens` or `max_length` is out of bounds.
        """
        super().__init__()
        self.model = model.eval()
        self.tokenizer = configure_pad_token(tokenizer, model_config=model.config)
        default = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
        self.batch_tokens = default if batch_tokens is None else batch_tokens
        self.max_length = resolve_max_length(model.config, tokenizer) if max_length is None else max_length
        if self.batch_tokens < 1 or self.max_length < 2:
            raise ValueError(f"needs batch_tokens >= 1 and max_length >= 2, got {batch_tokens} and {max_length}")
        self._plans: OrderedDict[Any, _Plan] = OrderedDict()
        self._encoded: OrderedDict[Any, list[Tokens]] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return self.model.device

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None if the tokenizer has none."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """The token that stands in for an empty context: begin of text, else end of text."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def shares_prefixes(self) -> bool:
        """Whether a common beginning is computed once: all layers keep keys and values of every position."""
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        rotary = getattr(config, "rope_parameters", None) is not None
        return rotary and not windowed and set(kinds) == {"full_attention"}

    @property
    def branches(self) -> bool:
        """Whether the continuations of one context are computed in one row."""
        return self.shares_prefixes and self.model.config._attn_implementation in ("sdpa", "eager")

    # --- lm-eval's interface ---

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        """Log-likelihoods of continuations, each after its context.

        Args:
            requests: Instances whose arguments are (context, continuation).
            disable_tqdm: Of lm-eval's interface; no bar is drawn here.

        Returns:
            For each request the sum of the log-probabilities of the continuation's tokens, and whether each
            of them is the most probable one.

        Raises:
            TaskError: A continuation has no tokens, or more than `max_length`.
        """
        key = ("loglikelihood", self._settings, tuple(request.args for request in requests))
        plan = self._remember(self._plans, key, lambda: self._plan_loglikelihood(requests))
        scored = self._score(plan)
        for request, answer in zip(requests, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, longer ones in windows of `max_length` tokens.

        Args:
            requests: Instances whose argument is (text,).
            disable_tqdm: Of lm-eval's interface; no bar is drawn here.

        Returns:
            For each text the sum over all of its tokens; 0 for a text without tokens.
        """
        encoded = self._encode([request.args[0] for request in requests])
        windows = [self._windows(tokens) for tokens in encoded]
        flat = list(itertools.chain.from_iterable(windows))
        scored = iter(self._score(self._plan([(*window, i) for i, window in enumerate(flat)])))
        totals = [float(sum(next(scored)[0] for _ in text)) for text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue the contexts, up to the first stop string.

        Greedy decoding of a model that `shares_prefixes` runs here, and finished texts leave the batch; the
        rest (sampling, beams, penalties, other models) is passed to `model.generate`.

        Args:
            requests: Instances whose arguments are (context, generation settings as lm-eval knows them).
            disable_tqdm: Of lm-eval's interface; no bar is drawn here.

        Returns:
            For each request the text without its stop string.

        Raises:
            TaskError: The length to generate leaves no room for a context within `max_length`.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            contexts = [requests[index].args[0] for index in indices]
            for index, text in zip(indices, self._generate(contexts, requests[indices[0]].args[1]), strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    # --- tokens ---

    def _encode(self, strings: Iterable[str], add_special_tokens: bool | None = None) -> list[Tokens]:
        """Token ids; special tokens as the tokenizer adds them, but no second begin-of-text token."""
        strings = list(strings)
        distinct = list(dict.fromkeys(strings))
        begin = None if self.prefix_token_id is None else self.tokenizer.decode(self.prefix_token_id)
        ids: dict[str, Tokens] = {}
        for bare in (True, False):
            chosen = [s for s in distinct if bare == (add_special_tokens is None and has_bos_prefix(s, begin))]
            options = {"add_special_tokens": False} if bare or add_special_tokens is False else {}
            if chosen:
                encoded = self.tokenizer(chosen, return_attention_mask=False, **options)["input_ids"]
                ids.update(zip(chosen, map(tuple, encoded), strict=True))
        return [ids[string] for string in strings]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        """Contexts and continuations as tokens; white space that ends a context goes to the continuation."""
        moved = [(context.rstrip(), context[len(context.rstrip()) :] + text) for context, text in pairs]
        contexts = self._encode(context for context, _ in moved)
        wholes = self._encode(context + text for context, text in moved)
        bare = iter(self._encode((text for context, text in pairs if context == ""), add_special_tokens=False))
        encoded = []
        for (context, _), head, whole in zip(pairs, contexts, wholes, strict=True):
            if context == "":
                head, whole = (), next(bare)
            encoded.append((head, whole[len(head) :]) if head else self._after_nothing(whole))
        return encoded

    def _after_nothing(self, continuation: Tokens) -> tuple[Tokens, Tokens]:
        prefix = self.prefix_token_id
        if prefix is None:
            raise TaskError("an empty context needs a begin- or end-of-text token, and the tokenizer has none")
        return (continuation[:1], continuation[1:]) if continuation[:1] == (prefix,) else ((prefix,), continuation)

    def _windows(self, tokens: Tokens) -> list[tuple[Tokens, Tokens]]:
        rolling = get_rolling_token_windows(
            token_list=list(tokens),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(tuple(context), tuple(rest)) for context, rest in map(make_disjoint_window, rolling)]

    # --- planning ---

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.batch_tokens, self.max_length, self.branches, self.shares_prefixes

    @staticmethod
    def _remember(memory: OrderedDict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, or what it returned for this key before; the least recently used goes first."""
        if key not in memory:
            memory[key] = make()
            if len(memory) > _PLANS_KEPT:
                memory.popitem(last=False)
        memory.move_to_end(key)
        return memory[key]

    def _plan_loglikelihood(self, requests: Sequence[Instance]) -> _Plan:
        encoded = self._encode_pairs([request.args[:2] for request in requests])
        documents = [
            context if request.doc_id is None else (request.task_name, request.doc_id)
            for request, (context, _) in zip(requests, encoded, strict=True)
        ]
        return self._plan([(*pair, document) for pair, document in zip(encoded, documents, strict=True)])

    def _plan(self, encoded: Sequence[tuple[Tokens, Tokens, Any]]) -> _Plan:
        """Plan (context, continuation, document) triples; the document says which may share a row."""
        distinct: dict[tuple[Tokens, Tokens], int] = {}
        queries: list[_Query] = []
        answers = []
        for context, continuation, document in encoded:
            self._check_continuation(continuation)
            inputs = (context + continuation)[-(self.max_length + 1) :][:-1]
            if (inputs, continuation) not in distinct:
                distinct[inputs, continuation] = len(queries)
                queries.append(_Query(inputs, continuation, document))
            answers.append(distinct[inputs, continuation])
        rows = _build_rows(queries, branching=self.branches, longest=min(self.batch_tokens, _LONGEST_ROW))
        return _Plan(answers, len(queries), [self._plan_cluster(*c) for c in self._clusters(rows)])

    def _check_continuation(self, continuation: Tokens) -> None:
        if not 1 <= len(continuation) <= self.max_length:
            raise TaskError(
                f"a continuation must have 1 to {self.max_length} tokens (the model's longest input), "
                f"got {len(continuation)}"
            )

    def _clusters(self, rows: Sequence[_Row]) -> list[tuple[list[_Row], int]]:
        if not rows or not self.shares_prefixes:
            return [(list(rows), 0)] if rows else []
        found = _find_clusters([tuple(row.tokens[: row.sharable]) for row in rows])
        return [([rows[i] for i in members], prefix) for members, prefix in found]

    def _plan_cluster(self, rows: Sequence[_Row], prefix: int) -> _Cluster:
        common = tuple(rows[0].tokens[:prefix])
        suffixes = sorted((row.without(prefix) for row in rows), key=lambda row: -len(row.tokens))
        batches = _take_while_fits(suffixes, lambda chosen: self._fits(chosen, prefix))
        return _Cluster(common, [_pad_batch(batch, prefix) for batch in batches])

    def _fits(self, rows: Sequence[_Row], prefix: int) -> bool:
        width = len(rows[0].tokens)
        scored = sum(row.num_scored for row in rows)
        return (
            len(rows) * width <= self.batch_tokens
            and len(rows) * (prefix + width) <= _CACHED_TOKENS_FACTOR * self.batch_tokens
            and len(rows) * width * (prefix + width) <= _MASK_CELLS
            and scored * self.model.config.get_text_config().vocab_size <= _LOGIT_CELLS
        )

    # --- scoring ---

    @torch.no_grad()
    def _score(self, plan: _Plan) -> list[Scored]:
        totals = torch.zeros(plan.num_queries, dtype=torch.float64)
        misses = torch.zeros(plan.num_queries, dtype=torch.long)
        for cluster in plan.clusters:
            cached = self._read(cluster.prefix)
            for batch in cluster.batches:
                logprobs, greedy = self._score_batch(batch, cached)
                totals.index_add_(0, batch.queries, logprobs)
                misses.index_add_(0, batch.queries, (~greedy).long())
        answers = list(zip(totals.tolist(), (misses == 0).tolist(), strict=True))
        return [answers[query] for query in plan.answers]

    def _score_batch(self, batch: _Batch, cached: _KeysValues) -> tuple[Tensor, Tensor]:
        """Log-probability (float64) and greediness of each token to predict, on the CPU: both (M,)."""
        mask = None if batch.ends is None else self._tree_mask(batch.ends, _length(cached))
        logits = self._logits_at(
            batch.at.to(self.device),
            input_ids=batch.tokens.to(self.device),
            position_ids=batch.positions.to(self.device),
            attention_mask=mask,
            **_as_cache(cached, len(batch.tokens)),
        ).float()
        picks, targets = batch.picks.to(self.device), batch.targets.to(self.device)
        logprobs = logits[picks, targets] - logits.logsumexp(-1)[picks]
        greedy = logits.argmax(-1)[picks] == targets
        return logprobs.double().cpu(), greedy.cpu()

    def _tree_mask(self, ends: Tensor, prefix: int) -> Tensor:
        """Additive mask (B, 1, T, P + T) by which tokens see the prefix and their ancestors only."""
        ends = ends.to(self.device)
        order = torch.arange(ends.shape[1], device=self.device)
        hidden = (order[None, :] > order[:, None]) | (order[None, :, None] >= ends[:, None, :])
        shape = (len(ends), 1, ends.shape[1], prefix + ends.shape[1])
        mask = torch.zeros(shape, dtype=self.model.dtype, device=self.device)
        mask[:, 0, :, prefix:].masked_fill_(hidden, torch.finfo(self.model.dtype).min)
        return mask

    def _logits_at(self, at: Tensor, **inputs: Any) -> Tensor:
        """Logits (N, V) at chosen places of the flattened batch; the output layer runs for these only."""
        head = self.model.get_output_embeddings()
        if head is None:
            return self.model(**inputs, use_cache="past_key_values" in inputs).logits.flatten(0, 1)[at]
        hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[at][None],))
        try:
            return self.model(**inputs, use_cache="past_key_values" in inputs).logits[0]
        finally:
            hook.remove()

    def _read(self, prefix: Tokens) -> _KeysValues:
        """Keys and values (1, heads, P, head size) of a common beginning, layer by layer."""
        if not prefix:
            return []
        cache = DynamicCache()
        tokens = torch.tensor([prefix], device=self.device)
        last = torch.tensor([len(prefix) - 1], device=self.device)
        self._logits_at(last, input_ids=tokens, past_key_values=cache)
        return [(keys, values) for keys, values, *_ in cache]

    # --- generation ---

    def _generate(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(dict(settings), DEFAULT_MAX_NEW_TOKENS))
        end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        stops = handle_stop_sequences(options.pop("until", None), eos=end)
        new_tokens = options.pop("max_gen_toks")
        if not 1 <= new_tokens < self.max_length:
            raise TaskError(
                f"generating {new_tokens} tokens leaves no room for a context: the model's longest input is "
                f"{self.max_length} tokens; lower max_gen_toks in the task"
            )
        encoded = [tokens[-(self.max_length - new_tokens) :] for tokens in self._encode_prompts(contexts)]
        if self.shares_prefixes and self._is_greedy(options):
            generated = self._decode_all(encoded, stops, new_tokens)
        else:
            generated = self._generate_all(encoded, stops, new_tokens, options)
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _encode_prompts(self, contexts: Sequence[str]) -> list[Tokens]:
        def encode() -> list[Tokens]:
            begin = getattr(self.tokenizer, "bos_token", None)
            plain = {c: not has_bos_prefix(c, begin) for c in contexts}
            ids = {c: tuple(self.tokenizer.encode(c, add_special_tokens=plain[c])) for c in plain}
            return [ids[context] or self._after_nothing(())[0] for context in contexts]

        return self._remember(self._encoded, tuple(contexts), encode)

    def _is_greedy(self, options: Mapping[str, Any]) -> bool:
        """Whether nothing but the most probable token decides: no sampling, beams, penalties, ..."""
        plain = set(options) <= {"do_sample", "temperature"} and not options.get("do_sample")
        config = getattr(self.model, "generation_config", None)
        return plain and (config is None or set(config.to_diff_dict()) <= _NEUTRAL_GENERATION)

    @property
    def _end_tokens(self) -> set[int]:
        config = getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        configured = ends if isinstance(ends, list) else [ends]
        return {token for token in (*configured, self.eot_token_id) if token is not None}

    def _prompt_batches(self, prompts: Sequence[Tokens], new_tokens: int) -> Iterator[tuple[Tokens, Sequence[int]]]:
        """Batches of prompts as (common beginning, indices), longest first within a cluster."""
        for members, prefix in _find_clusters([prompt[:-1] for prompt in prompts]):
            members = sorted(members, key=lambda i: -len(prompts[i]))

            def fits(chosen: Sequence[int], prefix: int = prefix) -> bool:
                longest = len(prompts[chosen[0]])
                cached = len(chosen) * (longest + new_tokens)
                return (
                    len(chosen) * (longest - prefix) <= self.batch_tokens
                    and cached <= _CACHED_TOKENS_FACTOR * self.batch_tokens
                    and len(chosen) * self.model.config.get_text_config().vocab_size <= _LOGIT_CELLS
                )

            for chosen in _take_while_fits(members, fits):
                yield prompts[chosen[0]][:prefix], chosen

    def _pad_left(self, suffixes: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """Tokens and attention mask, both (B, T), padded on the left."""
        width = max(map(len, suffixes))
        padding = self.tokenizer.pad_token_id or 0
        tokens = torch.full((len(suffixes), width), padding, device=self.device)
        mask = torch.zeros(len(suffixes), width, dtype=torch.long, device=self.device)
        for i, suffix in enumerate(suffixes):
            tokens[i, width - len(suffix) :] = torch.tensor(suffix, device=self.device)
            mask[i, width - len(suffix) :] = 1
        return tokens, mask

    @torch.no_grad()
    def _decode_all(self, prompts: Sequence[Tokens], stops: list[str], new_tokens: int) -> list[list[int]]:
        """Greedy continuations of the prompts, equal prompts once."""
        distinct = list(dict.fromkeys(prompts))
        generated: dict[Tokens, list[int]] = {}
        for prefix, chosen in self._prompt_batches(distinct, new_tokens):
            suffixes = [distinct[i][len(prefix) :] for i in chosen]
            texts = self._decode(self._read(prefix), suffixes, _Stops(self.tokenizer, stops), new_tokens)
            generated.update(zip((distinct[i] for i in chosen), texts, strict=True))
        return [generated[prompt] for prompt in prompts]

    def _decode(
        self, cached: _KeysValues, suffixes: Sequence[Tokens], stops: _Stops, new_tokens: int
    ) -> list[list[int]]:
        """Greedy continuations of one batch; rows leave it when a quarter of them has finished."""
        tokens, mask = self._pad_left(suffixes)
        seen = torch.ones(len(suffixes), _length(cached), dtype=torch.long, device=self.device)
        positions = (_length(cached) + mask.cumsum(-1) - 1).clamp(min=0)
        mask = torch.cat([seen, mask], -1)
        cache = _as_cache(cached, len(suffixes)).get("past_key_values") or DynamicCache()
        texts: list[list[int]] = [[] for _ in suffixes]
        rows = list(range(len(suffixes)))  # which text each row of the batch continues
        running = set(rows)
        ends = self._end_tokens
        for _ in range(new_tokens):
            last = torch.arange(1, len(rows) + 1, device=self.device) * tokens.shape[1] - 1
            logits = self._logits_at(
                last, input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            tokens = logits.argmax(-1)[:, None]
            chosen = tokens[:, 0].tolist()
            for row, token in zip(rows, chosen, strict=True):
                if row in running:
                    texts[row].append(token)
            windows = stops.found([texts[row] for row in rows])
            running -= {r for r, t, hit in zip(rows, chosen, windows, strict=True) if hit or t in ends}
            if not running:
                break
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], -1)
            positions = positions[:, -1:] + 1
            if 4 * len(running) <= 3 * len(rows):
                kept = [i for i, row in enumerate(rows) if row in running]
                index = torch.tensor(kept, device=self.device)
                cache.batch_select_indices(index)
                tokens, mask, positions = tokens[index], mask[index], positions[index]
                rows = [rows[i] for i in kept]
        return texts

    def _generate_all(
        self, prompts: Sequence[Tokens], stops: list[str], new_tokens: int, options: Mapping[str, Any]
    ) -> list[list[int]]:
        """Continuations by `model.generate`, for everything that is not plain greedy decoding."""
        from lm_eval.models.utils_hf import stop_sequences_criteria

        settings = {k: v for k, v in options.items() if k != "temperature" or options.get("do_sample")}
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        per_batch = _CACHED_TOKENS_FACTOR * self.batch_tokens
        generated: list[list[int]] = [[] for _ in prompts]
        for chosen in _take_while_fits(
            order, lambda picked: len(picked) * (len(prompts[picked[0]]) + new_tokens) <= per_batch
        ):
            tokens, mask = self._pad_left([prompts[i] for i in chosen])
            length = tokens.shape[1]
            limit = {} if {"max_length", "max_new_tokens"} & set(settings) else {"max_new_tokens": new_tokens}
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, stops, length, len(chosen)),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **limit,
                **settings,
            )
            for index, text in zip(chosen, output[:, length:].tolist(), strict=True):
                generated[index] = text
        return generated


# --- keys and values of a common beginning ----------------------------------------------------------------

_KeysValues = list[tuple["Tensor", "Tensor"]]
"""Keys and values, each (1, heads, P, head size), layer by layer; empty when there is no beginning."""


def _length(cached: _KeysValues) -> int:
    return cached[0][0].shape[-2] if cached else 0


def _as_cache(cached: _KeysValues, rows: int) -> dict[str, DynamicCache]:
    """Model input for a batch that continues the beginning; nothing when there is none."""
    if not cached:
        return {}
    expanded = [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in cached]
    return {"past_key_values": DynamicCache(expanded)}


class _Stops:
    """Finds stop strings in what was generated, looking back as far as `HFLM` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in self.stops]
        self.lookback = max(lengths, default=0) + 2

    def found(self, generated: Sequence[list[int]]) -> list[bool]:
        """For each text whether its last tokens hold a stop string."""
        tails = self.tokenizer.batch_decode([tokens[-self.lookback :] for tokens in generated])
        return [any(stop in tail for stop in self.stops) for tail in tails]
