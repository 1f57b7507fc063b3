"""Divides layers among stages, whose replicas may be of different device kinds and tensor-parallel degrees, before devices are chosen.

`rules` is the interface of the cost models that the search uses (`physical` is one). `tables` holds a model's values for one micro-batch
size and number of replicas (made by `compile`). `search` chooses among tables: `reach`, with `coverage` and `prices`, quickly excludes step
times that a table cannot reach; `cuts` is the exact search within one table. `costs` predicts a given division, `explain` finds out why
nothing fits, `mixing` makes stages of two kinds.
"""
