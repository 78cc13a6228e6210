"""How work runs: tasks over an executor, threads, workspaces that are kept, interrupts, and what solvers print."""
