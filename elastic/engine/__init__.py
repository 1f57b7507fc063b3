"""The computation of one worker in one view: model, stages, gradients, optimizer, generators."""
