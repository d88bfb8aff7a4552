"""`python -m two_level_mha check`: what is wrong with a cluster, before a job finds out.

    check     asks every rank for                                     in
    ranks     a sign of life, and its GPU                             ranks.py
    builds    versions, libraries, rates, CPU, environment            ranks.py, ../facts.py
    groups    process groups, and their time-outs                     groups.py
    clocks    its wall clock against rank 0's                         ranks.py
    memory    its free memory                                         ranks.py
    order     its host and LOCAL_RANK                                 ranks.py
    links     times of collectives per axis, of messages per pair     links.py
    layers    a layer of each scheme against the unsplit one          layers.py

A check is a probe, which every rank runs, with collectives where it needs them, and a judge, which makes findings of
all ranks' answers. Answers go over the store (run.py), so that a rank that a collective waits for can be named.
"""

from two_level_mha.check.command import add_check
from two_level_mha.check.context import Context, Finding, Inputs
from two_level_mha.check.run import CHECKS, run_checks

__all__ = ["CHECKS", "Context", "Finding", "Inputs", "add_check", "run_checks"]
