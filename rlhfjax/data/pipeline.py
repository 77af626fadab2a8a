"""Sources to batches through Grain. The order is a function of (seed, epoch) and the position is one integer: the step.

`batches[step]` is always the same batch, so a resumed run continues where it was without reading what came before.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from rlhfjax import types
from rlhfjax.config.schema import Batch, Data, PretrainingMix, RankedBatch, RolloutBatch
from rlhfjax.data import batches, token_rows
from rlhfjax.data.by_step import Batches, Placed, PromptBatches
from rlhfjax.data.datasets import RandomAccess
from rlhfjax.data.numbering import Listed, Origins
from rlhfjax.data.sources import open_either
from rlhfjax.data.tokens import items as prepared
from rlhfjax.data.tokens.opening import TokenShards, Use
from rlhfjax.errors import DataError
from rlhfjax.text.chat import Untrained, encode_demonstration
from rlhfjax.text.loading import AnyTokenizer

Report = Callable[[str], None]
Pair = tuple[list[int], list[int]]  # prompt ids and response ids
AnyBatch = Batch | RankedBatch | RolloutBatch
Packed = batches.PackedRows | prepared.PackedShards
Ranked = batches.RankedItems | prepared.RankedShards
Prompts = batches.PromptItems | prepared.PromptShards
_ROWS = 2**44


@dataclass(frozen=True)
class Reader:
    """What every stage needs to open data: the tokenizer, the directory of prepared data, the seed, where to report.

    One of several processes makes of each batch only its own rows; the order is that of all of them together.
    """

    tokenizer: AnyTokenizer
    data_dir: Path
    seed: int
    report: Report = lambda text: None
    local: Callable[[int], Any] = lambda size: None  # which rows of a batch of so many this process makes
    place: str = "RUN/tokenizer"  # where the tokenizer lies
    _rows: dict[Any, Any] = field(default_factory=dict)  # what was tokenised already, for all stages of a run

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        key = (*key, str(self.tokenizer.chat))  # what a stage writes otherwise is other rows
        if key not in self._rows:
            self._rows[key] = make()
        return self._rows[key]

    def _rules(self, entry: Data, batch: AnyBatch, train_on: str = "last") -> token_rows.Rules:
        return token_rows.Rules(entry.name, batch.refused, self.report, train_on)

    def open(self, data: Data, kind: str, **use: Any) -> RandomAccess | TokenShards:
        """The records of one data entry of the configuration, or its rows of tokens, fit for this `use` of them."""
        opened = open_either(data.source, data.split, self.data_dir, kind, data.reading)
        if isinstance(opened, TokenShards):
            opened.require(Use(data.name, self.tokenizer, self.place, **use))
        return opened

    def documents(self, data: Sequence[Data], batch: Batch, shuffle: bool = True) -> Batches:
        """Packed documents, each source with its share of the rows."""
        sources = [self._document_source(entry, batch.length, True) for entry in data]
        return self._batches(sources, [entry.weight for entry in data], batch.size, types.TokenBatch, shuffle)

    def _document_source(self, entry: Data, length: int, packed: bool) -> Packed:
        def make() -> Packed:
            source = self.open(entry, "document", length=length, setting="length", packed=packed)
            if isinstance(source, TokenShards):
                return prepared.PackedShards(source, length, self.tokenizer.pad_id)
            rows = token_rows.document_rows(source, self.tokenizer, length)
            return batches.PackedRows(rows, length, packed=packed, pad_id=self.tokenizer.pad_id)

        return self._once(("documents", entry.name, length, packed), make)

    def demonstrations(
        self, data: Sequence[Data], batch: Batch, train_on: str, mix: PretrainingMix | None = None, shuffle: bool = True
    ) -> Batches:
        """Packed demonstrations, with pretraining documents as `mix.fraction` of the rows where a mix is given."""
        sources = [self._demonstration_source(entry, batch, train_on) for entry in data]
        weights = [entry.weight for entry in data]
        own = sum(len(source) for source in sources)
        if mix:
            share = mix.fraction / (1 - mix.fraction) * sum(weights)
            total = sum(entry.weight for entry in mix.data)
            sources += [self._document_source(entry, batch.length, batch.pack) for entry in mix.data]
            weights += [share * entry.weight / total for entry in mix.data]
        made = self._batches(sources, weights, batch.size, types.TokenBatch, shuffle)
        # An epoch is one pass over the demonstrations, whatever is mixed in.
        return replace(made, rows=round(own / (1 - mix.fraction)) if mix else own)

    def _demonstration_source(self, entry: Data, batch: Batch, train_on: str) -> Packed:
        def make() -> Packed:
            use = {"packed": batch.pack, "train_on": train_on, "drops": _drops(batch)}
            source = self.open(entry, "demonstration", length=batch.length, **use)
            if isinstance(source, TokenShards):
                return prepared.PackedShards(source, batch.length, self.tokenizer.pad_id)
            rows = token_rows.demonstration_rows(source, self.tokenizer, self._rules(entry, batch, train_on))
            fits = token_rows.within(entry.name, rows.tokens.lengths, batch.length, batch.overlong, self.report)
            fits = fits[rows.tokens.lengths[fits] > 0]
            rows = token_rows.TokenRows(rows.tokens.select(fits), rows.targets.select(fits))
            return batches.PackedRows(rows, batch.length, packed=batch.pack, pad_id=self.tokenizer.pad_id)

        return self._once(("demonstrations", entry.name, repr(batch), train_on), make)

    def comparisons(self, data: Sequence[Data], batch: RankedBatch, shuffle: bool = True) -> Batches:
        """Ranked candidates; `overlong: drop` leaves out candidates that are too long, and comparisons without two."""
        sources = [self._ranked_source(entry, batch) for entry in data]
        made = self._batches(sources, [entry.weight for entry in data], batch.size, types.RankedBatch, shuffle)
        return replace(made, longest=max(source.longest for source in sources))

    def _ranked_source(self, entry: Data, batch: RankedBatch) -> Ranked:
        return self._once(("comparisons", entry.name, repr(batch)), lambda: self._ranked_items(entry, batch))

    def _ranked_items(self, entry: Data, batch: RankedBatch) -> Ranked:
        source = self.open(entry, "comparison", length=batch.length, drops=_drops(batch))
        if isinstance(source, TokenShards):
            _require_room(source.facts["counts"]["candidates"], batch, entry.name)
            return prepared.RankedShards(source, batch.candidates, batch.length, self.tokenizer.pad_id)
        rows = token_rows.ranked_rows(source, self.tokenizer, self._rules(entry, batch))
        if batch.overlong == "error":  # a comparison is as long as its longest response: the row to name
            longest = np.maximum.reduceat(rows.tokens.lengths, rows.groups[:-1])
            token_rows.within(entry.name, longest, batch.length, "error")
        fits = token_rows.within(f"{entry.name} responses", rows.tokens.lengths, batch.length, "drop", self.report)
        fits = fits[rows.tokens.lengths[fits] > 0]
        counts = np.bincount(np.searchsorted(rows.groups, fits, side="right") - 1)
        _require_room(int(counts.max()), batch, f"{entry.name} row {counts.argmax()}")
        kept, count = rows.select(fits), int((rows.prompt_lengths > 0).sum())
        left_out = count - (len(kept.groups) - 1)
        if left_out == count:
            raise DataError(f"{entry.name}: expected comparisons that prefer one response, got ties alone")
        if left_out:
            self.report(
                f"{entry.name}: {left_out} of {count} comparisons without a preference left out "
                f"({token_rows.share(left_out, count)})"
            )
        return batches.RankedItems(kept, batch.candidates, batch.length, self.tokenizer.pad_id)

    def prompts(self, data: Sequence[Data], batch: RolloutBatch, shuffle: bool = True) -> PromptBatches:
        """Left-padded prompts, whose `uid` is their place in the order."""
        items, sources = zip(*(self._prompt_source(entry, batch) for entry in data), strict=True)
        weights = [entry.weight for entry in data]
        made = self._batches(items, weights, batch.size, types.PromptBatch, shuffle)
        # Of the same lengths and seed, and so in the same order.
        places: Sequence[Any] = [Origins(number, each.keep) for number, each in enumerate(items)]
        origins = self._batches(places, weights, batch.size, types.PromptBatch, shuffle).dataset
        each = zip(data, sources, items, strict=True)
        listed = [Listed(entry.name, len(source), item.keep) for entry, source, item in each]
        how = made.make, made.rows, made.size, made.local, made.longest, listed
        return PromptBatches(Placed(made.dataset), *how, origins=origins, sources=sources)

    def _prompt_source(self, entry: Data, batch: RolloutBatch) -> tuple[Prompts, Any]:
        def make() -> tuple[Prompts, Any]:
            limit, setting = batch.prompt_length, "batch.prompt_length"
            source = self.open(entry, "prompt", length=limit, setting=setting, drops=_drops(batch))
            if isinstance(source, TokenShards):
                return prepared.PromptShards(source, limit, self.tokenizer.pad_id), prepared.PromptRecords(source)
            rows = token_rows.prompt_rows(source, self.tokenizer, self._rules(entry, batch))
            keep = token_rows.within(entry.name, rows.lengths, limit, batch.overlong, self.report, setting)
            keep = keep[rows.lengths[keep] > 0]
            return batches.PromptItems(rows, keep, batch.prompt_length, self.tokenizer.pad_id), source

        return self._once(("prompts", entry.name, batch.prompt_length, batch.overlong, batch.refused), make)

    def demonstration_ids(self, data: Sequence[Data], length: int, count: int, refused: str = "error") -> list[Pair]:
        """Prompt ids and response ids of `count` demonstrations of at most `length` tokens, the same for a seed.

        Every data entry gives an equal share. Raises DataError when no demonstration is that short, and on one that
        cannot be written unless `refused` is "drop".
        """
        share, pairs = -(-count // len(data)), []
        for entry in data:
            key = ("some demonstrations", entry.name, length, share, refused)
            pairs += self._once(key, partial(self._some_demonstrations, entry, length, share, refused))
        if not pairs:
            names = ", ".join(entry.name for entry in data)
            raise DataError(f"{names}: expected demonstrations of at most {length} tokens, got none")
        return pairs[:count]

    def _some_demonstrations(self, entry: Data, length: int, count: int, refused: str) -> list[Pair]:
        fit, over = [], 0
        for prompt, response in self._encoded(entry, refused):
            if len(prompt) + len(response) > length:
                over += 1
            else:
                fit.append((prompt, response))
            if len(fit) == count:
                break
        if over and fit:
            self.report(
                f"{entry.name}: {over} of {over + len(fit)} demonstrations that were looked at are longer than "
                f"{length} tokens, and others were taken; raise batch.length to keep them"
            )
        return fit

    def _encoded(self, entry: Data, refused: str) -> Iterator[Pair]:
        source = self.open(entry, "demonstration")
        if isinstance(source, TokenShards):
            order: Any = grain.MapDataset.range(len(source)).seed(self.seed).shuffle()
            yield from prepared.demonstrations(source, (order[i] for i in range(len(source))))
            return
        for row in np.random.default_rng(self.seed).permutation(len(source)).tolist():
            try:
                yield encode_demonstration(self.tokenizer, source[row])
            except Untrained:
                continue
            except DataError as error:
                if refused == "error":
                    raise DataError(f"{entry.name} row {row}: {error}") from error

    def comparison_ids(self, data: Sequence[Data], batch: AnyBatch) -> list[token_rows.Ranked]:
        """Every comparison as prompt ids, the whole ids of each response, and ranks; `batch.refused` as for prompts."""
        return [compared for entry in data for compared in self._comparisons(entry, batch)]

    def _comparisons(self, entry: Data, batch: AnyBatch) -> list[token_rows.Ranked]:
        def make():
            source = self.open(entry, "comparison")
            if isinstance(source, TokenShards):
                return list(prepared.comparisons(source))
            return list(token_rows.comparisons(source, self.tokenizer, self._rules(entry, batch)))

        return self._once(("comparison ids", entry.name, batch.refused), make)

    def _batches(
        self, sources: Sequence[Any], weights: Sequence[float], size: int, make: Callable[..., Any], shuffle: bool
    ) -> Batches:
        datasets = [grain.MapDataset.source(source).seed(self.seed) for source in sources]
        # Without end for any run; the length of a mixture of truly endless ones does not fit an index.
        datasets = [(data.shuffle() if shuffle else data).repeat(_ROWS // len(data) + 1) for data in datasets]
        mixed = grain.MapDataset.mix(datasets, weights) if len(datasets) > 1 else datasets[0]
        return Batches(mixed, make, sum(len(source) for source in sources), size, self.local(size))


def _drops(batch: AnyBatch) -> tuple[str, ...]:
    return tuple(f"--{name}" for name in ("overlong", "refused") if getattr(batch, name) == "drop")


def _require_room(count: int, batch: RankedBatch, where: str) -> None:
    if count > batch.candidates:
        raise DataError(
            f"{where}: expected at most {batch.candidates} responses per comparison (batch.candidates), got {count}; "
            "raise batch.candidates"
        )
