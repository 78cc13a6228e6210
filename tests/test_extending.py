"""docs/extending.md runs as printed, and what it adds passes the tests of what is built in; what docs/ names exists."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lpgd
from tests import test_gradients, test_nodes, test_solvers
from tests.method_table import MethodCase
from tests.node_cases import NodeCase, random
from tests.problem_table import CASES, Case
from tests.test_gradients import difference, planted_solution, random_cotangent
from tests.test_readme import read_sections

ROOT = Path(__file__).parent.parent
EXTENDING = ROOT / "docs" / "extending.md"
SECTIONS = {section.heading: section for section in read_sections(EXTENDING.read_text(encoding="utf-8"))}
POLYHEDRAL = [case for case in CASES if case.problem.structure.cones.is_polyhedral]


def run(heading: str) -> dict[str, Any]:
    """The names that a section's blocks define."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    for line, code in SECTIONS[heading].blocks:
        exec(compile("\n" * line + code, str(EXTENDING), "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture(scope="module")
def solver() -> Any:
    return run("A solver")["ADMM"]()


@pytest.fixture(scope="module")
def method() -> Any:
    return run("A gradient method")["Richardson"]


@pytest.fixture(scope="module")
def node() -> Any:
    return run("A declarative node")["PositivePart"]


@pytest.fixture(scope="module")
def game() -> dict[str, Any]:
    return run("A class of problems")


def test_there_are_four_examples() -> None:
    assert list(SECTIONS) == ["A solver", "A gradient method", "A declarative node", "A class of problems"]


# -- a solver -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", POLYHEDRAL, ids=repr)
def test_the_solver_passes_the_row_of_its_table(solver: Any, case: Case) -> None:
    test_solvers.test_solutions_are_the_planted_ones(solver, 1e-6, case)
    test_solvers.test_augmenting_at_the_solution_leaves_it_optimal(solver, 1e-6, case)


def test_the_solver_fails_as_others_do(solver: Any) -> None:
    for curvature in (0.0, 1.0):
        test_solvers.test_each_element_has_its_own_status(solver, curvature)
    test_solvers.test_limits_are_statuses(solver)
    test_solvers.test_a_time_limit_that_cannot_be_kept_is_refused(solver)
    test_solvers.test_infinite_bounds_are_no_bounds(solver)
    test_solvers.test_data_are_not_modified(solver)
    test_solvers.test_a_batch_of_none(solver)


@pytest.mark.parametrize("case", [case for case in POLYHEDRAL if case.regular], ids=repr)
def test_lpgd_through_the_solver_is_the_exact_gradient(solver: Any, case: Case) -> None:
    cotangent = random_cotangent(case)
    exact, _ = lpgd.ImplicitKKT().vjp(planted_solution(case), cotangent, solver)
    perturbed, info = lpgd.LPGD(1e-4).vjp(solver.solve(case.problem), cotangent, solver)
    assert info.counts == {"average": case.problem.batch_size}
    assert difference(perturbed, exact) < 1e-5


# -- a gradient method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.regular], ids=repr)
def test_the_method_passes_the_row_of_its_table(method: Any, case: Case) -> None:
    row = MethodCase(method(1e-3), "extrapolated", 1e-6, 1e-6)
    test_gradients.test_each_method_gives_the_exact_gradient(case, row)
    test_gradients.test_forward_mode_is_the_transpose_of_reverse_mode(case, row)


def test_the_method_equals_finite_differences_in_a_layer(method: Any) -> None:
    layer = lpgd.QPLayer(gradient=method())
    P, A = torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()), torch.ones(1, 3, dtype=torch.float64)
    b = torch.ones(1, dtype=torch.float64)
    q = torch.tensor([[-1.0, 0.5, 0.3], [0.2, -4.0, 9.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, A, b: layer(P, q, A=A, b=b, lb=0.0)[:2], (q, A.requires_grad_(), b))
    curved = lpgd.Node(lambda x, y: (0.5 * (y - x).square() + y**4).sum())
    assert torch.autograd.gradcheck(lpgd.NodeLayer(curved, method(1e-2)), (random(0, 2, 3).requires_grad_(),))


def test_the_method_is_refused_where_a_problem_lacks_what_it_needs(method: Any) -> None:
    with pytest.raises(TypeError, match=r"Richardson.* needs a solution that moves with small changes"):
        lpgd.LPLayer(gradient=method(), integer=[0])


# -- a declarative node -------------------------------------------------------------------------------------------


def _inputs(seed: int) -> tuple[torch.Tensor, ...]:
    return random(seed, 3, 4), random(seed + 1, 3).abs() + 0.2


OF_NODES = [
    name
    for name, test in vars(test_nodes).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["case"]
]


@pytest.mark.parametrize("name", OF_NODES)
def test_the_node_passes_the_tests_of_its_table(node: Any, name: str) -> None:
    getattr(test_nodes, name)(NodeCase(node(), _inputs))


def test_there_are_such_tests() -> None:
    assert len(OF_NODES) > 6


def test_the_node_names_elements_outside_of_its_domain(node: Any) -> None:
    x, mu = torch.randn(3, 2, dtype=torch.float64), torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    with pytest.raises(lpgd.SolverError, match=r"element 1 of 3: INVALID_DATA.*mu must be positive"):
        lpgd.NodeLayer(node())(x, mu)


# -- a class of problems ------------------------------------------------------------------------------------------


def test_the_games_gradient_is_that_of_finite_differences(game: dict[str, Any]) -> None:
    layer = game["GameLayer"](temperature=0.7)
    M = random(0, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(layer, (M,), atol=1e-6)
    _, change = torch.func.jvp(lambda M: tuple(layer(M)), (M.detach(),), (random(1, 2, 3, 2),))
    x, y = layer(M)
    (gradient,) = torch.autograd.grad(x[:, 0].sum() + y[:, 1].sum(), M)
    forward = change[0][:, 0].sum() + change[1][:, 1].sum()
    torch.testing.assert_close(forward, (gradient * random(1, 2, 3, 2)).sum(), atol=1e-6, rtol=1e-6)


def test_the_game_and_its_derivatives_are_those_of_its_lagrangian(game: dict[str, Any]) -> None:
    Game, GameData, GamePoint = game["Game"], game["GameData"], game["GamePoint"]
    M = random(0, 2, 3, 2).requires_grad_()
    problem = Game(game["GameStructure"]((3, 2), 0.7), GameData(M), 2)
    plus, minus, cotangent = (
        GamePoint(random(seed, 2, 3).softmax(-1), random(seed + 1, 2, 2).softmax(-1)) for seed in (2, 4, 6)
    )
    weight = torch.tensor([0.5, -2.0], dtype=torch.float64)
    value = (weight * (problem.lagrangian(plus) - problem.lagrangian(minus))).sum()
    (expected,) = torch.autograd.grad(value, M)
    torch.testing.assert_close(problem.gradient_difference(plus, minus, weight).M, expected)
    tilted = problem.tilt(torch.tensor([0.3, 0.5, -0.3, -0.5], dtype=torch.float64), cotangent)
    twice = GamePoint(*(part.repeat(2, 1) for part in plus))
    added = sum((a * b).sum(-1) for a, b in zip(cotangent, plus, strict=True))
    step = torch.tensor([0.3, 0.5], dtype=torch.float64)
    wanted = torch.cat([problem.lagrangian(plus) + sign * step * added for sign in (1.0, -1.0)])
    torch.testing.assert_close(tilted.lagrangian(twice), wanted)
    solution = game["GameSolver"]().solve(problem)
    start = (part.detach().requires_grad_() for part in solution.point)
    point = GamePoint(*start)
    for slope in torch.autograd.grad(problem.lagrangian(point).sum(), point):  # constant over a simplex
        torch.testing.assert_close(slope, slope.mean(-1, keepdim=True).expand_as(slope), atol=1e-9, rtol=0)


def test_the_layer_of_games_has_what_layers_have(game: dict[str, Any]) -> None:
    layer = game["GameLayer"](temperature=0.5)
    M = torch.randn(2, 3, 4, 3)
    x, y = first = layer(M)
    assert (x.dtype, tuple(x.shape), tuple(y.shape)) == (torch.float32, (2, 3, 4), (2, 3, 3))
    again = layer(M, warm_start=first)
    assert again.info.solution.iterations.max() < first.info.solution.iterations.max()
    bad = M.clone()
    bad[1, 2, 0, 0] = np.nan
    with pytest.raises(lpgd.SolverError, match="element 5 of 6: INVALID_DATA"):
        layer(bad)
    filled, _ = game["GameLayer"](0.5, on_error="nan")(bad.requires_grad_())
    filled.nansum().backward()
    assert filled[1, 2].isnan().all()
    assert filled.isnan().any(-1).sum() == 1
    assert not bad.grad[1, 2].any()
    for refused in (lpgd.ImplicitKKT(), lpgd.LPGD(tau=0.1, rho=0.5)):
        with pytest.raises(TypeError, match="which a matrix game does not have"):
            layer.gradient = refused


# -- what the pages name ------------------------------------------------------------------------------------------

PAGES = sorted((ROOT / "docs").rglob("*.md"))
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FOLDERS = ("lpgd", "tests", "docs", "examples", "benchmarks")


def quoted(page: Path) -> list[str]:
    """What stands in backticks, outside of blocks of code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@cache
def sources(folder: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob("*.py")))


@cache
def classes() -> dict[str, list[type]]:
    """Every class of the library, by name."""
    found: dict[str, list[type]] = {}
    for module in pkgutil.walk_packages(lpgd.__path__, "lpgd."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, type) and value.__module__.startswith("lpgd"):
                found.setdefault(name, []).append(value)
    return found


def has(kind: type, name: str) -> bool:
    """Whether instances have such an attribute, declared or assigned."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    annotated = {key for base in kind.__mro__ for key in vars(base).get("__annotations__", {})}
    return hasattr(kind, name) or name in fields | annotated or f"self.{name} = " in inspect.getsource(kind)


@EACH_PAGE
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in link or (page.parent / link).exists(), link
    for name in quoted(page):
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./]*", name):
            # The files that extending.md would add are the only ones that need not exist.
            assert (ROOT / name).exists() or (page == EXTENDING and Path(name).stem in TO_BE_WRITTEN), name
        elif re.fullmatch(r"(\w+/)*\w+\.(py|toml|md)", name):
            assert [*ROOT.glob(name), *(ROOT / "lpgd").rglob(name), *(ROOT / "tests").rglob(name)], name


TO_BE_WRITTEN = {"admm", "richardson", "positive_part", "game"}


@EACH_PAGE
def test_names_of_the_library_exist(page: Path) -> None:
    for name in re.findall(r"(?<![\w/.])lpgd(?:\.[A-Za-z_]\w*)+", " ".join(quoted(page))):
        value, parts = lpgd, name.split(".")[1:]
        for place, part in enumerate(parts, 1):
            if not hasattr(value, part):
                importlib.import_module(".".join(["lpgd", *parts[:place]]))  # raises where there is no such module
            value = getattr(value, part)


@EACH_PAGE
def test_members_of_classes_exist(page: Path) -> None:
    for name in quoted(page):
        match = re.match(r"(_?[A-Z]\w{2,})\.([a-z_]\w*)", name)
        if match and not name.endswith((".md", ".py")):
            kinds = classes().get(match[1])
            assert kinds, name
            assert any(has(kind, match[2]) for kind in kinds), name


@EACH_PAGE
def test_tests_that_pages_name_exist(page: Path) -> None:
    for name in quoted(page):
        if re.fullmatch(r"test_\w+", name):
            assert f"def {name}(" in sources("tests"), name


@pytest.mark.parametrize("name", ["how_a_call_runs.md", "glossary.md", "architecture.md"])
def test_words_of_the_code_are_words_of_the_code(name: str) -> None:
    for word in quoted(ROOT / "docs" / name):
        if re.fullmatch(r"_?[A-Za-z]\w{2,}", word):
            assert re.search(rf"(def|class) {word}\b|\b{word}\b\s*[:=]", sources("lpgd")), word
