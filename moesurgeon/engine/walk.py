"""The walk: every stream and every batch through one layer, then through the next.

So a checkpoint of any size is read once, however much text and however many versions go through it, and
no more than two layers of it are in memory. A walk yields its layers one by one; who walks may look at
what goes in and out, change the overlay of a stream, run a layer as often as it likes, and then moves on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers.modeling_outputs import MoeModelOutputWithPast

from moesurgeon.engine.arguments import Arguments
from moesurgeon.engine.batches import Batch
from moesurgeon.engine.finite import NotFinite, error_after
from moesurgeon.engine.free import trim
from moesurgeon.engine.hidden import HiddenStates
from moesurgeon.engine.observe import Visitor, observed
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.engine.supply import Tensors
from moesurgeon.progress import Advance

Look = Callable[[Stream, int], Visitor | None]
"""For a stream and the number of a batch: who looks at its blocks."""


@dataclass(frozen=True)
class Layer:
    """Layer ``number`` with the weights of every stream in place."""

    number: int
    walk: Walk
    read: Mapping[Source, Tensors]

    def states(self, stream: Stream, batch: int) -> torch.Tensor:
        """Return what ``batch`` of ``stream`` comes in with [B, T, H]."""
        return self.walk.hidden[stream].get(batch).to(stream.source.supply.devices[self.number + 1])

    @torch.no_grad()
    def forward(self, stream: Stream, batch: int, visit: Visitor | None = None) -> torch.Tensor:
        """Return what the layer makes of ``batch`` of ``stream`` [B, T, H]; the stream stays where it is.

        Raises CheckpointError, with the tensors that are to blame, if that is not finite.
        """
        states = self.states(stream, batch)
        call = self._prepared(stream, batch, states)
        block = stream.blocks.get(self.number)
        started = time.perf_counter()
        try:
            if visit is not None and block is not None:
                with observed([block], visit):
                    output = call()
            else:
                output = call()
        except NotFinite as error:
            raise self._not_finite(stream, error) from error
        if states.device.type != "cpu":
            torch.accelerator.synchronize(states.device)
        self.walk.seconds[stream][batch] += time.perf_counter() - started
        if not _is_finite(output, self.walk.batches[batch]):
            raise self._not_finite(stream)
        return output

    def _not_finite(self, stream: Stream, otherwise: NotFinite | None = None) -> NotFinite:
        prefix = stream.skeleton.layer_prefix.replace("{layer}", str(self.number))
        tensors = {f"{prefix}.{name}": one for name, one in stream.skeleton.layer(self.number).named_parameters()}
        return error_after(f"layer {self.number}", tensors, stream.pieces, otherwise)

    def on(self, stream: Stream, batch: int, states: torch.Tensor) -> torch.Tensor:
        """Return what the layer makes of ``states`` [B, T, H] in place of the batch's own; under gradients if asked."""
        return self._prepared(stream, batch, states)()

    def _prepared(self, stream: Stream, batch: int, states: torch.Tensor) -> Callable[[], torch.Tensor]:
        positional, named = self.walk.arguments[stream.source].of(self.walk.batches[batch], self.number, states)
        if stream.source.placement.spread:
            positional, named = send_to_device((positional, named), states.device)
        module = stream.skeleton.layer(self.number)

        def call() -> torch.Tensor:
            result = module(states, *positional, **named)
            output: torch.Tensor = result[0] if isinstance(result, tuple) else result
            return output

        return call

    def move(self, stream: Stream, batch: int, visit: Visitor | None = None) -> None:
        """Take ``batch`` of ``stream`` through the layer."""
        self.walk.hidden[stream].put(batch, self.forward(stream, batch, visit), layer=self.number)

    def rebind(self, stream: Stream, name: str) -> None:
        """Let ``stream`` compute with what its overlay says of ``name`` by now."""
        stream.rebind(name, self.read[stream.source])


@dataclass(frozen=True)
class Tail:
    """What comes after the last layer: the norm and the head of every stream."""

    walk: Walk

    @torch.no_grad()
    def logits(self, stream: Stream, batch: int, start: int, stop: int) -> torch.Tensor:
        """Return the logits [B, stop - start, V] at these positions of ``batch``, as the stock model makes them."""
        return self.on(stream, self.walk.hidden[stream].get(batch)[:, start:stop])

    def on(self, stream: Stream, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, T, V] of what came out of the last layer [B, T, H]; under gradients if asked."""
        model: Any = stream.skeleton.model
        norm = model.get_submodule(stream.anatomy.family.final_norm.removesuffix(".weight"))
        device = stream.source.supply.devices[-1]
        states = norm(hidden.to(device))
        base, stock = model.base_model, model.base_model.forward
        base.forward = lambda **_given: MoeModelOutputWithPast(last_hidden_state=states)
        try:
            logits: torch.Tensor = model(inputs_embeds=states, use_cache=False).logits
        finally:
            base.forward = stock
        return logits.to(stream.source.placement.device)


class Walk:
    """``streams`` and ``batches`` on their way. ``seconds``: what each batch of a stream took to compute.

    ``folder``: where hidden states are held in files; None: in memory. ``keep``: those before a layer stay
    in their file until the next layer is done (``engine.state``).
    """

    def __init__(
        self, streams: Sequence[Stream], batches: Sequence[Batch], folder: Path | None = None, *, keep: bool = False
    ) -> None:
        assert len(set(streams)) == len(streams), "a stream walks once; take another one with the same overlay"
        self.streams = tuple(streams)
        self.batches = tuple(batches)
        self.sources = tuple(dict.fromkeys(stream.source for stream in streams))
        self.arguments = {source: Arguments(source.skeleton, source.scratch.masks) for source in self.sources}
        self.seconds = {stream: np.zeros(len(batches)) for stream in streams}
        self.hidden = {
            stream: HiddenStates(
                [(*batch.tokens.shape, stream.anatomy.hidden) for batch in self.batches],
                stream.source.placement.dtype,
                None if folder is None else folder / f"{number}.hidden",
                keep=keep,
            )
            for number, stream in enumerate(self.streams)
        }

    def layers(self, start: int = 0) -> Generator[Layer]:
        """Yield the layers from ``start`` on; what was not moved by whoever walks is not moved.

        Streams of a checkpoint with fewer layers wait at its end for the others. Close it where you leave early,
        as an error does, and nothing is read any more.
        """
        with self._groups(start + 1 if start else 0) as groups:
            for group, read in groups:
                mine = [stream for stream in self.streams if stream.source in read]
                with ExitStack() as stack:
                    for stream in mine:
                        stack.enter_context(stream.bound(group, read[stream.source]))
                    if group == 0:
                        self._embed(mine, read)
                    else:
                        for stream in mine:
                            self.hidden[stream].turn_to(group - 1)
                        yield Layer(group - 1, self, read)
                        for stream in mine:
                            self.hidden[stream].turn_to(group)

    def backwards(self, stop: int = 0) -> Generator[Layer]:
        """Yield the layers from the last one down to ``stop``, read again, to whoever kept what they were given.

        For streams of one checkpoint. Nothing is moved. Close it where you leave early.
        """
        (source,) = self.sources
        with closing(source.supply.walk(stop + 1, source.layers + 1, backwards=True)) as groups:
            for group, read in groups:
                with ExitStack() as stack:
                    for stream in self.streams:
                        stack.enter_context(stream.bound(group, read))
                    yield Layer(group - 1, self, {source: read})

    def tail(self) -> Iterator[Tail]:
        """Yield the tail, once."""
        trim()  # the pieces that the layers' batches left are no places for logits
        with ExitStack() as stack:
            for source in self.sources:
                groups = source.supply.walk(source.layers + 1)
                stack.callback(groups.close)
                group, read = next(groups)
                for stream in self.streams:
                    if stream.source is source:
                        stack.enter_context(stream.bound(group, read))
            yield Tail(self)

    def moving(self, layer: Layer) -> Iterator[tuple[Stream, int]]:
        """Yield every stream that has ``layer`` with every batch, the streams of a batch one after the other."""
        for batch in range(len(self.batches)):
            for stream in self.streams:
                if stream.source in layer.read:
                    yield stream, batch

    def through(self, look: Look | None = None, *, start: int = 0, advance: Advance | None = None) -> None:
        """Take everything through all layers, with the visitors that ``look`` gives."""
        with closing(self.layers(start)) as layers:
            for layer in layers:
                for stream, batch in self.moving(layer):
                    layer.move(stream, batch, look(stream, batch) if look else None)
                    if advance:
                        advance(self.batches[batch].text_tokens / stream.source.layers / len(self.streams))

    def tokens_per_second(self, stream: Stream) -> float:
        """Return the speed of the layers alone, the median over batches: one busy moment does not count."""
        tokens = np.array([batch.text_tokens for batch in self.batches])
        return float(np.median(tokens / np.maximum(self.seconds[stream], 1e-9)))

    def _embed(self, streams: Sequence[Stream], read: Mapping[Source, Tensors]) -> None:
        for stream in streams:
            arguments = Arguments(stream.skeleton, 0)
            for number, batch in enumerate(self.batches):
                states = arguments.embedded(batch)
                if not _is_finite(states, batch):
                    raise error_after("the embedding", read[stream.source], stream.pieces)
                self.hidden[stream].put(number, states)

    @contextmanager
    def _groups(self, start: int) -> Iterator[Iterator[tuple[int, Mapping[Source, Tensors]]]]:
        """The groups of all sources up to the last layer, side by side."""
        walks = {source: source.supply.walk(start, source.layers + 1) for source in self.sources}

        def side_by_side() -> Iterator[tuple[int, Mapping[Source, Tensors]]]:
            for group in range(start, max(source.layers for source in self.sources) + 1):
                yield group, {source: next(walk)[1] for source, walk in walks.items() if group <= source.layers}

        try:
            yield side_by_side()
        finally:
            for walk in walks.values():
                walk.close()


def _is_finite(states: torch.Tensor, batch: Batch) -> bool:
    """Tell whether the states [B, T, H] of all text are numbers; what stands at padding does not count."""
    return bool(states.isfinite().all()) or bool(states[batch.is_text.to(states.device)].isfinite().all())
