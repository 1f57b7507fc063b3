"""The division of layers to stages whose replicas may be of different device kinds and tensor-parallel degrees, before devices are chosen.

`rules` is what the search asks of a cost model (`physical` is one), `tables` what a model comes to for one micro-batch size and
number of replicas (`compile`). `search` chooses among tables: `reach`, by `coverage` and `prices`, tells quickly that a step time is out
of a table's reach; `cuts` is the exact search within one. `costs` predicts a given division, `explain` says why nothing fits, `mixing`
makes stages of two kinds.
"""
