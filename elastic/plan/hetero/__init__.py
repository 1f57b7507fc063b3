"""The heterogeneous partition: layers to stages whose replicas may be of different device kinds and tensor-parallel degrees.

`rules` is the interface of a cost model (`reference` and `physical` are two), `tables` what a model comes to for one micro-batch size and
number of replicas (`compile`). `search` chooses among tables: `reach`, by `coverage` and `prices`, tells quickly that a step time is out
of a table's reach; `cuts` is the exact search within one. `predict` costs a given plan, `explain` says why nothing fits, `mixing` makes
stages of two kinds.
"""
