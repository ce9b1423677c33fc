"""The two passes of a streamed step: forwards, keeping what every layer is given, and backwards, layer by layer.

Legend: B windows, T tokens of a window, N tokens of text in a piece, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path

import torch

from moesurgeon.engine.hidden import HiddenStates
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Layer, Walk
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.estimator import Learning
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.share import Share
from moesurgeon.recovery.teacher import Said
from moesurgeon.recovery.teacher_cache import Cached
from moesurgeon.recovery.terms import Terms, pieces_of
from moesurgeon.surgery.anatomy import Anatomy


class Passes:
    """Steps of ``student``, whose modules hold ``adapted``. ``teacher``: what it said, or how the student itself routes
    as the teacher; None where it has no say. ``folder``: where states are kept; ``piece``: see ``pieces_of``."""

    def __init__(
        self,
        student: Stream,
        adapted: Adapted,
        learning: Learning,
        losses: Losses,
        teacher: Cached | Anatomy | None,
        *,
        folder: Path | None,
        piece: int | None,
    ) -> None:
        self.student, self.adapted, self.learning, self.losses = student, adapted, learning, losses
        self.cached = teacher if isinstance(teacher, Cached) else None
        self.routing = teacher if isinstance(teacher, Anatomy) else None
        # The same modules once more: the same layer with the adapters off.
        self.teacher = None if self.routing is None else Stream(student.source, skeleton=student.skeleton)
        self.folder, self.piece = folder, piece
        self.lowest = min(target.layer for target in adapted.targets)

    def forward(self, share: Share) -> Generator[Mapping[str, float], bool, None]:
        """Take this process's ``share`` of a batch through all layers; then go backwards as often as is sent whether
        balance and z count.

        Yields the figures of each term (none before the first).
        """
        step = _Step(self, share)
        step.forward()
        beside = yield {}
        while True:
            step.backward(beside)
            beside = yield step.terms.complete()


class _Step:
    """What is known of one batch between its passes."""

    def __init__(self, passes: Passes, share: Share) -> None:
        pieces = pieces_of(share.batch, passes.piece)
        self.passes, self.pieces = passes, pieces
        student, anatomy = passes.student, passes.student.anatomy
        self.moe_layers = anatomy.moe_layers
        self.terms = Terms(passes.losses, passes.learning.rule, pieces, share)
        streams = [student] if passes.teacher is None else [student, passes.teacher]
        self.walk = Walk(streams, pieces, passes.folder)
        self.inputs = {layer: self._states(f"{layer}.input") for layer in range(passes.lowest, anatomy.layers)}
        self.theirs = {
            layer: self._states(f"{layer}.teacher")
            for layer in range(anatomy.layers if passes.teacher and passes.losses.hidden else 0)
        }
        self.routers: dict[tuple[int, int], torch.Tensor] = {}
        self.said = [passes.cached.says(piece) if passes.cached else Said() for piece in pieces]
        self.at_the_end, self.flowing = self._states("end.gradient"), self._states("gradient")

    def forward(self) -> None:
        """Take all pieces from the embedding to the loss, and the loss back to what came out of the last layer."""
        with closing(self.walk.layers()) as layers:
            for layer in layers:
                self._teach(layer)
                self._learn(layer)
                if self.passes.losses.hidden:
                    self._match(layer)
        passes, student = self.passes, self.passes.student
        for tail in self.walk.tail():
            for number, said in enumerate(self.said):
                if passes.teacher is not None and passes.losses.objective == "distill":
                    with torch.no_grad():
                        said = Said(logits=tail.on(passes.teacher, self.walk.hidden[passes.teacher].get(number)))
                states = self._here(self.walk.hidden[student].get(number)).detach().requires_grad_()
                self.terms.at_the_end(number, tail.on(student, states), said).backward()
                assert states.grad is not None
                self.at_the_end.put(number, states.grad)

    def backward(self, beside: bool) -> None:
        """Take the gradients from the last layer down to the lowest that is trained; ``beside``: balance and z too."""
        for name in ("router", "balance", "z"):
            self.terms.figures.pop(name, None)
        gradients = self.at_the_end
        with closing(self.walk.backwards(self.passes.lowest)) as layers:
            for layer in layers:
                for number in range(len(self.pieces)):
                    found = self._back(layer, number, gradients.get(number), beside)
                    if found is not None:
                        self.flowing.put(number, found)
                gradients = self.flowing

    def _teach(self, layer: Layer) -> None:
        """Take the teacher through ``layer``, where it is the student itself."""
        passes, learning = self.passes, self.passes.learning
        if passes.teacher is None or passes.routing is None:
            return
        with passes.adapted.off(), learning.routing_as(passes.routing), learning.recording() as routed:
            for number, piece in enumerate(self.pieces):
                layer.move(passes.teacher, number)
                if passes.losses.router:
                    for each in routed:
                        self.routers[layer.number, number] = each.logits[piece.is_text.flatten()]
                routed.clear()

    def _learn(self, layer: Layer) -> None:
        """Take the student through ``layer`` and keep what it is given."""
        student, learning = self.passes.student, self.passes.learning
        with learning.recording() as routed:
            learning.rehearses = learning.capacity is not None
            try:
                for number, piece in enumerate(self.pieces):
                    if layer.number in self.inputs:
                        self.inputs[layer.number].put(number, layer.states(student, number))
                    learning.is_text = piece.is_text.flatten()
                    layer.move(student, number)
                    for each in routed:
                        self.terms.count(layer.number, number, each)
                    routed.clear()
            finally:
                learning.rehearses = False

    def _match(self, layer: Layer) -> None:
        """Compare what came out of ``layer`` with the teacher's, which is kept for the way back."""
        passes = self.passes
        for number in range(len(self.pieces)):
            if passes.teacher is not None:
                self.theirs[layer.number].put(number, self.walk.hidden[passes.teacher].get(number))
            mine = self._here(self.walk.hidden[passes.student].get(number))
            self.terms.see_hidden(layer.number, number, mine, self._wanted(layer.number, number))

    def _wanted(self, layer: int, number: int) -> torch.Tensor:
        """Return the teacher's hidden states after ``layer`` of a piece's text [N, H]."""
        if self.passes.cached is not None:
            states: torch.Tensor = self.said[number].hidden[layer]
            return states
        return self._here(self.theirs[layer].get(number))[self.pieces[number].is_text]

    def _back(self, layer: Layer, number: int, gradient: torch.Tensor, beside: bool) -> torch.Tensor | None:
        """Run ``layer`` again on what it was given of a piece, and return the gradient of that; None of the lowest."""
        passes, learning, at = self.passes, self.passes.learning, layer.number
        states = self._here(self.inputs[at].get(number)).detach().requires_grad_(at > passes.lowest)
        learning.routed.clear()
        learning.is_text = self.pieces[number].is_text.flatten()
        output = layer.on(passes.student, number, states)
        scalars = []
        for routed in learning.routed:
            main, more = self.terms.of_routers(at, number, routed, self._routers_at(at, number))
            scalars += [each for each in (main, more if beside else None) if each is not None]
        if passes.losses.hidden:
            scalars.append(self.terms.of_hidden(at, number, output, self._wanted(at, number)))
        scalars = [each for each in scalars if each.requires_grad]
        torch.autograd.backward(
            [output, *scalars], [self._here(gradient), *(torch.ones_like(each) for each in scalars)]
        )
        learning.routed.clear()
        return states.grad

    def _routers_at(self, layer: int, number: int) -> torch.Tensor | None:
        """Return the teacher's router logits of a piece's text [N, E], where they are asked for."""
        if not self.passes.losses.router:
            return None
        if self.passes.cached is None:
            return self.routers[layer, number]
        logits: torch.Tensor = self.said[number].routers[self.moe_layers.index(layer)]
        return logits

    def _here(self, states: torch.Tensor) -> torch.Tensor:
        """Bring what may be in a file to where it is computed."""
        return states.to(self.passes.student.source.placement.device)

    def _states(self, name: str) -> HiddenStates:
        student, folder = self.passes.student, self.passes.folder
        return HiddenStates(
            [(*piece.tokens.shape, student.anatomy.hidden) for piece in self.pieces],
            student.source.placement.dtype,
            None if folder is None else folder / name,
        )
