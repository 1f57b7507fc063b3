"""Cuts a whole model, such as one of transformers, into layers that the pipeline can spread over workers.

The body of such a model is an `nn.ModuleList` of blocks, which its forward calls once each, in order. Its forward itself is not taken
apart: each layer runs the part of it that it needs, with the blocks replaced by stand-ins (`forwarding`).

    first layer   the model's forward until it reaches the last block: what comes before the blocks, and the arguments of each block
    each block    the block, with its arguments
    last layer    the model's forward again, whose last block returns what the real one has computed: what comes behind the blocks

So masks, position embeddings and everything else that a forward prepares are its own. What crosses a boundary is the state that one block
hands to the next, the arguments that are tensors (`wiring`), and the model's inputs. The last layer runs what comes before the blocks once
more, without gradients, and with zeros in place of the parameters that are not its own: the result is not used.

One run of the uncut model shows which parameters belong to which layer (`tracing`). Whether the layers then compute the same is not argued
but tested: output, loss and gradients have the bits of the uncut model's on a micro-batch, or the model is refused (`check`).
"""
