"""Gates: conditions on the figures of a report, such as ``perplexity_ratio <= 1.02 and kl < 0.01``.

A gate compares numbers: figures by name, constants, ``+ - * /``, ``min``, ``max`` and ``abs``, joined by
``and``, ``or`` and ``not``. Everything else is refused when it is read, so that a gate can neither do nor
cost anything, and names are looked up here: what is left for ``simpleeval`` are plain variables.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from simpleeval import SimpleEval

from moesurgeon.errors import UsageError
from moesurgeon.evaluation.figures import Figures, Path, is_interval_end, name_of, why_unknown

_LONGEST = 2000  # characters
_DEEPEST = 40  # levels of the syntax tree; conditions joined by "and" are on one level
_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_FUNCTIONS = {"min": min, "max": max, "abs": abs}

_Kind = Literal["truth", "number"]


@dataclass(frozen=True)
class Condition:
    """One of the conditions that have to hold; ``tree`` has a variable where ``names`` says which figure."""

    text: str
    tree: ast.expr
    names: Mapping[str, Path]


@dataclass(frozen=True)
class Gate:
    """``expression``: as given; it holds if all ``conditions`` do."""

    expression: str
    conditions: tuple[Condition, ...]

    @property
    def figures(self) -> list[Path]:
        """The figures that are named, each once."""
        return list(dict.fromkeys(path for condition in self.conditions for path in condition.names.values()))

    def check(self, possible: Figures, otherwise: Mapping[str, Figures] | None = None) -> None:
        """Raise UsageError if a name is none of those that the report can have.

        ``otherwise``: what it could have with further options, by these.
        """
        for path in self.figures:
            if path not in possible:
                missing = next((option for option, more in (otherwise or {}).items() if path in more), None)
                reason = f"{name_of(path)} needs {missing}" if missing else why_unknown(path, possible)
                raise UsageError(f"gate {self.expression!r}: {reason}")

    def refuse_unknown_intervals(self, expected: Figures) -> None:
        """Raise UsageError if a condition needs an end of an interval that will have no value.

        ``expected``: the figures that the report will have, as far as the text tells. A condition with ``or`` or
        ``and`` inside may never ask for it, and is left to :meth:`judge`.
        """
        for condition in self.conditions:
            if any(isinstance(node, ast.BoolOp) for node in ast.walk(condition.tree)):
                continue
            for path in condition.names.values():
                if is_interval_end(path) and path in expected and expected[path] is None:
                    raise UsageError(f"gate {condition.text!r}: {_without_value(path)}")

    def judge(self, figures: Figures) -> dict[str, Any]:
        """Return what a report says of the gate: whether it passed, each condition, and the figures that it names.

        Conditions behind one that fails are looked at as well, as far as their figures exist. Raises UsageError
        for a figure that the report does not have.
        """
        self.check(figures)
        conditions: list[dict[str, Any]] = []
        for condition in self.conditions:
            try:
                holds: bool | None = self._holds(condition, figures)
            except UsageError:
                if all(earlier["passed"] for earlier in conditions):
                    raise
                holds = None
            conditions.append({"expression": condition.text, "passed": holds})
        return {
            "expression": self.expression,
            "passed": all(condition["passed"] for condition in conditions),
            "conditions": conditions,
            "values": {name_of(path): figures[path] for path in self.figures},
        }

    def _holds(self, condition: Condition, figures: Figures) -> bool:
        evaluator = SimpleEval(
            operators=_OPERATORS,
            functions=_FUNCTIONS,
            names=_Variables({name: (path, figures[path]) for name, path in condition.names.items()}),
        )
        try:
            return bool(evaluator.eval(condition.text, previously_parsed=condition.tree))
        except ZeroDivisionError:
            raise UsageError(f"gate {condition.text!r} divides by zero; compare products instead") from None
        except OverflowError:
            raise UsageError(f"gate {condition.text!r} has a number that is too large; correct it") from None
        except _NoValue as missing:
            raise UsageError(f"gate {condition.text!r}: {_without_value(missing.path)}") from None


class _NoValue(Exception):
    def __init__(self, path: Path) -> None:
        super().__init__(name_of(path))
        self.path = path


def _without_value(path: Path) -> str:
    if is_interval_end(path):
        return (
            f"{name_of(path)} has no value, since one document gives no interval; give text of two documents at "
            "least, or compare the figure itself"
        )
    return f"{name_of(path)} has no value in this report; ask for it behind an `or`"


class _Variables(dict[str, Any]):
    """Figures by variable; one without a value is an error only where it is needed."""

    def __getitem__(self, name: str) -> float:
        path, value = super().__getitem__(name)
        if value is None:
            raise _NoValue(path)
        return float(value)


def parse_gate(expressions: Sequence[str]) -> Gate | None:
    """Return the gate that all ``expressions`` make together; None without any.

    >>> [condition.text for condition in parse_gate(["kl < 0.1 and loss < 2", "esap > 0.9"]).conditions]
    ['kl < 0.1', 'loss < 2', 'esap > 0.9']

    Raises UsageError for what is no gate.
    """
    if not expressions:
        return None
    texts = [" ".join(expression.split()) for expression in expressions]  # recipes have them over several lines
    conditions = [condition for text in texts for condition in _conditions(text)]
    return Gate(" and ".join(f"({text})" if len(texts) > 1 else text for text in texts), tuple(conditions))


def failure(gate: Mapping[str, Any]) -> str:
    """Say in a line which conditions of a judged gate did not hold, with the figures of the gate."""
    failed = [condition["expression"] for condition in gate["conditions"] if condition["passed"] is False]
    values = [f"{name} is {'none' if value is None else f'{value:.6g}'}" for name, value in gate["values"].items()]
    return f"gate failed: {'; '.join(failed)} ({', '.join(values)})"


def _conditions(expression: str) -> list[Condition]:
    """Read one expression and divide it at its outermost ``and``."""
    if len(expression) > _LONGEST:
        raise UsageError(f"gate {expression[:40]!r}... is longer than {_LONGEST} characters; divide it into several")
    if "#" in expression:  # what is behind it would not count
        raise UsageError(f"gate {expression[:200]!r} has a comment; leave it out")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of literals such as 1or
            tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deep"
        raise UsageError(
            f"gate {expression[:200]!r} cannot be read ({reason}); write it as perplexity_ratio <= 1.02"
        ) from error
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    found = []
    for part in parts:
        reader = _Reader(expression)
        kind, rewritten = reader.read(part, 0)
        if kind == "number":
            raise UsageError(f"gate {expression!r}: {reader.text(part)} is a number; compare it, as in <= 1.02")
        text = expression if len(parts) == 1 else reader.text(part)
        found.append(Condition(text, rewritten, reader.names))
    if not any(condition.names for condition in found):
        raise UsageError(f"gate {expression!r} names no figure, so that it is always the same; compare one")
    return found


class _Reader:
    """Allows what a gate may hold and puts a variable in place of every name of a figure."""

    def __init__(self, expression: str) -> None:
        self._expression = expression
        self.names: dict[str, Path] = {}

    def read(self, node: ast.expr, depth: int) -> tuple[_Kind, ast.expr]:
        if depth > _DEEPEST:
            raise UsageError(f"gate {self._expression[:200]!r} is nested too deep; divide it into several")
        match node:
            case ast.BoolOp(op, values):
                return "truth", ast.BoolOp(op, [self._of("truth", value, depth) for value in values])
            case ast.UnaryOp(ast.Not() as op, operand):
                return "truth", ast.UnaryOp(op, self._of("truth", operand, depth))
            case ast.UnaryOp(ast.USub() | ast.UAdd() as op, operand):
                return "number", ast.UnaryOp(op, self._of("number", operand, depth))
            case ast.Compare(left, ops, comparators) if all(type(op) in _OPERATORS for op in ops):
                sides = [self._of("number", side, depth) for side in (left, *comparators)]
                return "truth", ast.Compare(sides[0], ops, sides[1:])
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return "number", ast.BinOp(self._of("number", left, depth), op, self._of("number", right, depth))
            case ast.Call(ast.Name(name) as function, arguments, []) if self._is_call(name, len(arguments)):
                return "number", ast.Call(function, [self._of("number", each, depth) for each in arguments], [])
            case ast.Constant(int() | float() as value) if not isinstance(value, bool):
                return "number", node
            case ast.Name() | ast.Attribute() | ast.Subscript():
                variable = f"figure_{len(self.names)}"
                self.names[variable] = self._path(node)
                return "number", ast.Name(variable, ast.Load())
        raise self._refused(node)

    def text(self, node: ast.expr) -> str:
        """Return what was written for ``node``."""
        return ast.get_source_segment(self._expression, node) or ast.unparse(node)

    def _of(self, wanted: _Kind, node: ast.expr, depth: int) -> ast.expr:
        kind, rewritten = self.read(node, depth + 1)
        if kind != wanted:
            what = "a number where a condition is needed" if wanted == "truth" else "a condition, not a number"
            raise UsageError(f"gate {self._expression!r}: {self.text(node)} is {what}; correct it")
        return rewritten

    @staticmethod
    def _is_call(name: str, arguments: int) -> bool:
        return arguments == 1 if name == "abs" else name in _FUNCTIONS and arguments >= 2

    def _path(self, node: ast.expr) -> Path:
        """Return the figure that ``domains["my-code"].perplexity`` and the like name."""
        path: list[str | int] = []
        inner = node
        while True:
            match inner:
                case ast.Name(name):
                    return tuple(reversed([*path, name]))
                case ast.Attribute(inner, name):
                    path.append(name)
                case ast.Subscript(inner, ast.Constant(str() | int() as key)) if not isinstance(key, bool):
                    path.append(key)
                case _:
                    raise self._refused(node)

    def _refused(self, node: ast.expr) -> UsageError:
        return UsageError(
            f"gate {self._expression[:200]!r}: {self.text(node)[:80]} is not possible; a gate compares figures and "
            "numbers with + - * / min max abs, joined by and, or, not"
        )
