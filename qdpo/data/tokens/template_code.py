"""Compiles chat templates: operations that can make a value larger become calls of the sandbox."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame

OPERATORS = {"*": "multiply", "**": "power", "+": "add", "%": "modulo"}


class CountingCode(CodeGenerator):
    """Compiles operations on values to methods of the sandbox, and a count into each loop."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        written = sum(len(data.data) for part in node.body for data in _literals(part))
        count = nodes.Call(nodes.EnvironmentAttribute("step"), [nodes.Const(written)], [], None, None)
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno, environment=node.environment))
        super().visit_For(node, frame)

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if isinstance(node.node, nodes.EnvironmentAttribute):
            self._method(node.node.name, node.args, frame)
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._method("tilde", node.nodes, frame)

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        terms, left = [node.right], node.left
        while isinstance(left, nodes.Add):
            terms.append(left.right)
            left = left.left
        self._method("add", [left, *reversed(terms)], frame)

    def visit_Mul(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._method(OPERATORS["*"], [node.left, node.right], frame)

    def visit_Pow(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._method(OPERATORS["**"], [node.left, node.right], frame)

    def visit_Mod(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._method(OPERATORS["%"], [node.left, node.right], frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(node, super().visit_List, frame, all(isinstance(item, nodes.Const) for item in node.items))

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        is_plain = node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        self._made(node, super().visit_Tuple, frame, is_plain)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._made(node, super().visit_Dict, frame, False)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self._made(node, super().visit_Getitem, frame, not isinstance(node.arg, nodes.Slice))

    def _made(self, node: Any, visit: Callable[[Any, Frame], None], frame: Frame, is_plain: bool) -> None:
        if not is_plain:
            self.write("environment.made(")
        visit(node, frame)
        if not is_plain:
            self.write(")")

    def _method(self, name: str, args: list[nodes.Expr], frame: Frame) -> None:
        self.write(f"environment.{name}(")
        for arg in args:
            self.visit(arg, frame)
            self.write(", ")
        self.write(")")


def _literals(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    return chain((node,) if isinstance(node, nodes.TemplateData) else (), node.find_all(nodes.TemplateData))
