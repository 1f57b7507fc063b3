"""The heterogeneous partition: layers to stages whose replicas may be of different device kinds and tensor-parallel degrees.

`rules` is the interface of a cost model, `tables` what a model comes to for one micro-batch size and number of replicas, `reach` a quick
test of whether a step time is out of reach, `cuts` the exact search among the stages of one table, `search` the choice among tables.
"""
