"""Write small problems of the Maros-Mészáros set, as the package sif2jax states them, to a file of arrays.

``python benchmarks/extract_maros_meszaros.py OUT.npz``, in an environment with sif2jax.

minimise ½xᵀPx + qᵀx subject to A x = b, G x ≤ h, lower ≤ x ≤ upper; a constant of the objective is dropped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import sif2jax.cutest

# Those whose optimum agrees with the one that Maros and Mészáros (1999) publish: sif2jax states some inequalities of
# others (HS76, DUALC1, DUALC2, DUALC8) in the other direction.  HS35MOD fixes a variable by its bounds, and as rows
# these are dependent.
PUBLISHED = {
    "HS21": -9.996e1,
    "HS35": 1.11111111e-1,
    "HS51": 0.0,
    "HS52": 5.32664756,
    "HS53": 4.09302326,
    "DUAL1": 3.50129657e-2,
    "DUAL2": 3.37336761e-2,
    "DUAL3": 1.35755839e-1,
    "DUAL4": 7.46090842e-1,
    "DUALC5": 4.27232327e2,
}


def extract(name: str) -> dict[str, np.ndarray]:
    problem = getattr(sif2jax.cutest, name)()
    origin = jnp.zeros_like(problem.y0)
    n = origin.shape[0]

    def objective(x: jax.Array) -> jax.Array:
        return problem.objective(x, problem.args)

    def rows(place: int) -> tuple[np.ndarray, np.ndarray]:
        if problem.constraint(origin)[place] is None:
            return np.zeros((0, n)), np.zeros(0)
        slope = jax.jacobian(lambda x: problem.constraint(x)[place])(origin)
        return np.array(slope), np.array(problem.constraint(origin)[place])

    (A, at_origin), (G, slack) = rows(0), rows(1)
    lower, upper = problem.bounds or (np.full(n, -np.inf), np.full(n, np.inf))
    return {
        "P": np.array(jax.hessian(objective)(origin)),
        "q": np.array(jax.grad(objective)(origin)),
        "A": A,
        "b": -at_origin,
        "G": -G,
        "h": slack,
        "lower": np.array(lower),
        "upper": np.array(upper),
        "optimum": np.array(PUBLISHED[name] - float(objective(origin))),
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}/{key}": value for name in PUBLISHED for key, value in extract(name).items()}
    np.savez_compressed(out, **arrays)
    print(f"{len(PUBLISHED)} problems in {out}")
