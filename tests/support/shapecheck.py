"""The checker that tests put on npedit's functions: beartype, on those whose annotations state shapes.

The others are left alone: beartype cannot read `Self` on single methods, and plain types are not what goes wrong here.
They are not wrapped either. A wrapped function binds its arguments at every call, and is compiled twice more when its
module is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from beartype import beartype
from jaxtyping._import_hook import JaxtypingTransformer

SHAPED = ("Float[", "Int[", "Bool[", "Shaped[", "Num[", "Integer[", "UInt8[", "Int64[")


def check_shapes(function: Callable) -> Callable:
    """The function, with arguments and result checked against their stated shapes."""
    stated = [a if isinstance(a, str) else str(a) for a in getattr(function, "__annotations__", {}).values()]
    return beartype(function) if any(word in a for a in stated for word in SHAPED) else function


class ShapedOnly(JaxtypingTransformer):
    """Wraps the functions and classes of a module that state shapes, and no others."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        if _states_shapes([node.returns, *(argument.annotation for argument in every if argument)]):
            return super().visit_FunctionDef(node)
        return self._visit_inside(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if _states_shapes([field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]):
            return super().visit_ClassDef(node)
        return self._visit_inside(node)

    def _visit_inside(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        return node


def _states_shapes(annotations: list[ast.expr | None]) -> bool:
    return any(word in ast.unparse(found) for found in annotations if found for word in SHAPED)
