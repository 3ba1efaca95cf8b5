# SPDX-License-Identifier: Apache-2.0
"""Rewrites a parsed template so that what Jinja does without asking its environment is asked for, too.

Operators, calls and filters go through the environment. Loops, comparisons, `~`, slices, lists and what is printed do
not: each is wrapped in a filter of ours. Their names hold a blank, which no template can write.
"""

from typing import Any

from jinja2 import nodes, visitor

from jft.sandbox import budget

TICK, TICKED, CONCAT, MADE, PART, SHOWN = (
    f"its {name}" for name in ("tick", "ticked", "concat", "made", "part", "shown")
)
_REFUSED: dict[Any, str] = {
    nodes.Extends: "extends",
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "from",
    nodes.Block: "block",
    nodes.EvalContextModifier: "autoescape",
}


def guarded(template: nodes.Template) -> nodes.Template:
    """The template with filters where it may use time or memory.

    Raises:
      budget.Exceeded: it has a statement that reads other templates, or that changes the rules.
    """
    for kind, name in _REFUSED.items():
        for found in template.find_all(kind):
            raise budget.Exceeded(f"has {{% {name} %}} in line {found.lineno}")
    return _Guard().visit(template)


class _Guard(visitor.NodeTransformer):
    def __init__(self) -> None:
        self._gathering = 0  # statements around that gather what is printed in them

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._gathering += node.recursive
        self.generic_visit(node)
        self._gathering -= node.recursive
        if node.test is not None:
            node.test = _filter(node.test, TICKED)
        tick = nodes.ExprStmt(_filter(nodes.Const(None), TICK, node))
        node.body.insert(0, tick.set_lineno(node.lineno).set_environment(node.environment))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        return node if _is_quick(node) else _filter(node, TICKED)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes).set_lineno(node.lineno), CONCAT, node)

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or _is_constant(node):
            return node  # names that are set, or what stands in the template as it is
        return _filter(node, MADE)

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, PART) if isinstance(node.arg, nodes.Slice) else node

    def visit_Macro(self, node: Any) -> nodes.Node:
        """What is printed here is gathered, and not seen by `render` as it comes."""
        self._gathering += 1
        self.generic_visit(node)
        self._gathering -= 1
        return node

    visit_CallBlock = visit_FilterBlock = visit_AssignBlock = visit_Macro

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        if self._gathering:
            plain = (nodes.TemplateData, nodes.Const)
            node.nodes = [x if isinstance(x, plain) else _filter(x, SHOWN) for x in node.nodes]
        return node


def _filter(node: Any, name: str, place: Any = None) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None)
    place = place or node
    return made.set_lineno(place.lineno).set_environment(place.environment)


def _is_constant(node: Any) -> bool:
    return all(isinstance(each, nodes.Const) for each in node.iter_child_nodes())


def _is_quick(node: nodes.Compare) -> bool:
    """Whether one side is a constant to which the other is equal or not, or in which it is or not."""
    if len(node.ops) > 1:
        return False
    (first,) = node.ops
    if first.op in ("in", "notin"):
        return isinstance(first.expr, nodes.List | nodes.Tuple) and _is_constant(first.expr)
    return isinstance(first.expr, nodes.Const) or isinstance(node.expr, nodes.Const)
