"""Models whose initial values are computed later, where they are needed: they are built by functions, on torch's `meta` device.

    building    calls the user's functions, and puts parameters without memory in the place of those on meta
    recording   notes meanwhile what is done to the values of tensors that have none
    recipe      does it again, for one parameter, in real memory: the parameter's initial value

So whatever gives a parameter its value in ordinary code does so here: `reset_parameters`, constants of a constructor, loops over modules,
and `_init_weights` of Hugging Face models. Random numbers are drawn with the same operations, but each operation's generator is keyed by
(seed, layer, parameter's name, number of the draw). So a value does not depend on which other values are computed in the process, and
`torch.manual_seed` has no effect. A draw into a temporary tensor is keyed by its place in the construction.
"""
